"""Speed policies: what each leaves out, that a video says so, and that it is made again."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from cogvx import Pipeline
from cogvx.data.video import read_metadata
from cogvx.memory.plan import Plan
from cogvx.models.step_cache import StepCache
from cogvx.settings import SettingsError
from cogvx.speed import Speed
from cogvx_kernels import use_backend

QUICK = {"num_inference_steps": 6, "num_frames": 1, "seed": 0, "progress": False}


@pytest.fixture
def without_interpreter():
    """Triton's interpreter takes a minute for a clip."""
    with use_backend("reference"):
        yield


def frames(folder, speed=None, plan=None, **settings):
    pipeline = Pipeline.from_pretrained(folder, device="cpu", memory=plan, speed=speed)
    calls = []
    pipeline.transformer.transformer_blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    return pipeline("a red circle", **QUICK | settings).frames, len(calls)


def test_a_step_cache_by_hand():
    """Blocks that add 1, 2, 3 ... when they are computed; what they read drifts by a tenth of its size a step."""
    cache, computed = StepCache(0.25), []
    modulation = torch.zeros(1, 3, 2, 2)

    def blocks():
        computed.append(1)
        return vision + len(computed)

    found = []
    for step in range(8):
        vision = torch.tensor([[[1.0, -1.0]]])  # whose LayerNorm is itself
        modulation[:, 1] = 1.1**step - 1
        cache.last = step == 7
        found.append(float((cache(vision, modulation, blocks) - vision).mean()))
    # Two steps of a tenth are below a quarter, a third one is not; the last one is computed whatever the drift is.
    assert found == [1, 1, 1, 2, 2, 2, 3, 4] and cache.num_skipped == 4
    cache.clear()
    cache.last = False
    assert float((cache(vision, modulation, blocks) - vision).mean()) == 5


def test_steps_are_skipped_and_the_same_ones_whichever_way_guidance_goes(small_checkpoint):
    folder = small_checkpoint("1.5-5b")
    exact, all_calls = frames(folder)
    never, calls = frames(folder, Speed(step_cache=1e-9))
    assert calls == all_calls == 6 and np.array_equal(never, exact)
    often, calls = frames(folder, Speed(step_cache=1e9))
    assert calls == 2 and not np.array_equal(often, exact)  # the first and the last one
    some, calls = frames(folder, Speed(step_cache=1.5))
    assert 2 < calls < 6
    other, twice = frames(folder, Speed(step_cache=1.5), Plan(transformer="streamed", sequential_guidance=True))
    assert twice == 2 * calls and np.abs(other.astype(int) - some).max() <= 1


def test_attention_in_eight_bits_is_near_and_not_the_same(small_checkpoint, without_interpreter):
    folder = small_checkpoint("5b")
    exact, _ = frames(folder)
    found, _ = frames(folder, Speed(attention="int8"))
    assert np.abs(found.astype(int) - exact).max() > 0 and np.abs(found.astype(int) - exact).mean() < 2


def test_products_in_eight_bits_are_near_and_not_the_same(small_checkpoint):
    folder = small_checkpoint("5b")
    exact, _ = frames(folder)
    found, _ = frames(folder, Speed(products="fp8"))
    assert np.abs(found.astype(int) - exact).max() > 0 and np.abs(found.astype(int) - exact).mean() < 8
    streamed, _ = frames(folder, Speed(products="fp8"), Plan(transformer="streamed"))
    assert np.array_equal(streamed, found)


@pytest.mark.slow
def test_compiled_blocks_are_within_two_levels(small_checkpoint):
    folder = small_checkpoint("5b")
    exact, _ = frames(folder)
    pipeline = Pipeline.from_pretrained(folder, device="cpu", speed=Speed(compiled=True))
    counters = torch._dynamo.utils.counters
    counters.clear()
    found = pipeline("a red circle", **QUICK).frames
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert np.abs(found.astype(int) - exact).max() <= 2


def test_a_video_says_it_and_is_made_again(run_command, tmp_path, without_interpreter):
    words = ("--seed", 3, "--num-inference-steps", 3, "--num-frames", 1, "--no-progress")
    status, _, err = run_command("generate", "a red circle", "-o", tmp_path / "a.mp4", *words, "--device", "cpu",
                                 "--step-cache", 0.5, "--attention", "int8", "--weights", "fp8", "--products",
                                 "fp8")  # fmt: skip
    assert status == 0, err
    made = read_metadata(tmp_path / "a.mp4")
    assert made["speed"] == asdict(Speed(0.5, "int8", products="fp8")) and made["plan"] == Plan(weights="fp8").as_dict()
    status, out, err = run_command("replay", tmp_path / "a.mp4", "--no-progress", "--device", "cpu")
    assert (status, out.rpartition(": ")[2].strip(), err) == (0, "frames equal, bytes equal", "")
    status, _, err = run_command("generate", "a red circle", "-o", tmp_path / "b.mp4", *words, "--step-cache", -1)
    assert status == 2 and "step_cache is -1.0; it must be a number above 0, or None" in err


def test_what_cannot_be(small_checkpoint):
    for wrong in ({"step_cache": 0}, {"step_cache": float("nan")}, {"step_cache": True}, {"attention": "fp4"},
                  {"compiled": 1}, {"products": "int8"}):  # fmt: skip
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            Speed(**wrong)
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            Speed.read(wrong)
    for record in (None, [], {"steps": 1}):
        with pytest.raises(SettingsError, match=r"speed is .* a table of attention, compiled, products, step_cache"):
            Speed.read(record)
    folder = small_checkpoint("2b")
    with pytest.raises(SettingsError, match="compiled is True, and memory has a plan that moves the transformer"):
        Pipeline.from_pretrained(folder, memory=Plan(transformer="visiting"), speed=Speed(compiled=True))
    with pytest.raises(SettingsError, match="products is 'fp8', but weights are in int8"):
        Pipeline.from_pretrained(folder, weights="int8", speed=Speed(products="fp8"))
    pipeline = Pipeline.from_pretrained(folder, speed=Speed(step_cache=0.1))
    with pytest.raises(SettingsError, match="longer is 'windows'"):
        pipeline("a red circle", longer="windows", **QUICK)
    with pytest.raises(SettingsError, match="batch_size is 2; with step_cache it must be 1"):
        pipeline.batch(["a", "b"], batch_size=2, **QUICK)
