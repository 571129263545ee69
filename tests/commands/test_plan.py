"""A plan on the command line, and what a video says of the plan that it was made under."""

import pytest
import torch

from cogvx import Pipeline
from cogvx.data.video import read_metadata
from cogvx.memory.plan import Plan, PlanError
from cogvx.models.tiling import Tiling

SMALL = ("--model", "tiny", "--num-frames", 9, "--num-inference-steps", 2)
TILED = Plan("visiting", "streamed", "visiting", True, True, Tiling("blend", 40, 40, 8))


def test_an_amount_that_is_none(run_command):
    status, _, err = run_command("plan", *SMALL, "--memory", "lots")
    assert status == 2 and "it must be an amount such as 12GB" in err


def test_what_cannot_be_planned_is_named(run_command):
    for words, message in (
        (("train", "vae"), "'train vae' is nothing to plan; valid: train transformer, train lora"),
        (("train", "lora", "batc=2"), "batc is no option; did you mean batch?"),
        (("train", "transformer", "shard=0"), "what processes that share the weights out hold is not planned yet"),
    ):
        status, _, err = run_command("plan", *words, "--model", "tiny")
        assert status == 2 and message in err


@pytest.mark.soak
@pytest.mark.parametrize("model", ["tiny", "tiny-i2v"])
def test_it_prints_what_training_holds_and_turns_checkpointing_on_for_a_budget(run_command, model):
    words = ("plan", "train", "lora", "precision=fp32", "batch=4", "--model", model)
    status, out, err = run_command(*words)
    assert status == 0, err
    assert f"lora of {model}: 17 frames of 64 x 64, 4 samples a step, fp32\n" in out and "numbers learn" in out
    peak = out.partition("peak: ")[2].partition(" on the device")[0]
    assert run_command(*words, "--memory", peak)[1] == out
    status, _, err = run_command(*words, "--memory", "1MB")
    assert status == 2 and "this run needs" in err and "even with checkpointing" in err


@pytest.mark.soak  # every plan is made out, twice
def test_it_prints_a_plan_or_the_least_that_would_do(run_command):
    status, out, err = run_command("plan", *SMALL, "--memory", "1GB")
    assert status == 0, err
    assert "plan: text encoder resident; transformer resident; vae resident" in out and "decode" in out
    status, _, err = run_command("plan", *SMALL, "--memory", "1MB")
    assert status == 2 and "the least that does is" in err and "visiting" in err


def test_a_video_made_under_a_plan_is_made_again(run_command, tmp_path):
    """It carries a plan that may have changed it, and no other."""
    for plan, carried in ((TILED, TILED.as_dict()), (Plan("visiting", "streamed", "visiting"), None)):
        pipeline = Pipeline.from_pretrained("tiny", dtype=torch.float32, device="cpu", memory=plan)
        made = tmp_path / "made.mp4"
        pipeline.write(made, "a red circle", seed=0, num_frames=9, num_inference_steps=2, progress=False)
        assert read_metadata(made).get("plan") == carried
        status, out, err = run_command("replay", made, "--no-progress")
        assert (status, out.rpartition(": ")[2].strip(), err) == (0, "frames equal, bytes equal", "")


def test_a_plan_is_read_as_if_anybody_had_written_it():
    assert Plan.read(TILED.as_dict()) == TILED and Plan.read(Plan().as_dict()) == Plan()
    good = TILED.as_dict()
    for bad in (None, [], {}, {**good, "more": 1}, {**good, "vae": "streamed"}, {**good, "transformer": []},
                {**good, "tiling": 1}, {**good, "sequential_guidance": "yes"},
                {**good, "weights": "int4"}, {**good, "weights": []}):  # fmt: skip
        with pytest.raises(PlanError):
            Plan.read(bad)
    older = {name: value for name, value in good.items() if name != "weights"}
    assert Plan.read(older) == TILED
    with pytest.raises(ValueError, match="overlap of a tiling is 3"):
        Plan.read({**good, "tiling": {**good["tiling"], "overlap": 3}})
