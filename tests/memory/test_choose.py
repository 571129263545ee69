"""The plan for a budget: the first that keeps it, and what is said where none does."""

import warnings
from dataclasses import replace

import pytest
import torch

from cogvx import Pipeline
from cogvx.memory import choose
from cogvx.memory.choose import Choice, amount, choices, fitting, read_budget, warn_of_more
from cogvx.memory.plan import Plan, PlanError
from cogvx.memory.predict import Job, Prediction, Stage, predict
from cogvx.models.checkpoint import resolve_folder
from cogvx.models.text import TextEncoder
from cogvx.numerics import SAT
from cogvx.settings import Settings, read_configs


@pytest.fixture(scope="module")
def job():
    configs = read_configs("tiny")
    settings = Settings("x", num_frames=9, num_inference_steps=4, seed=0).resolve(configs)
    text = TextEncoder.from_pretrained(resolve_folder("tiny"), device="meta").model.config
    return Job(configs, settings, torch.bfloat16, text)


@pytest.fixture(scope="module")
def found(job):
    return list(choices(Pipeline, job))


@pytest.mark.soak
def test_a_combined_prediction_is_that_of_a_run(job, found):
    """Plans that were not run themselves, put together of the stages of others."""
    for plan in (
        Plan("visiting", "resident", "resident"),
        Plan("resident", "streamed", "visiting", halos_on_host=True),
        Plan("streamed", "visiting", "resident", True, True, found[-1].plan.tiling),
    ):
        combined = next(choice.prediction for choice in found if choice.plan == plan)
        whole = predict(Pipeline, job, plan)
        assert {name: stage.device for name, stage in combined.stages.items()} == {
            name: stage.device for name, stage in whole.stages.items()
        }, plan
        assert combined.moved.get("transformer", 0) == whole.moved.get("transformer", 0)


@pytest.mark.soak
def test_the_first_that_keeps_the_budget_is_taken(found):
    peaks = [choice.prediction.peak for choice in found]
    assert found[0].plan == Plan() and peaks[0] == max(peaks)
    assert fitting(found, peaks[0]).plan == Plan()
    chosen = fitting(found, peaks[0] - 1)
    assert chosen.prediction.peak < peaks[0] and chosen is next(c for c in found if c.prediction.peak < peaks[0])
    assert fitting(found, min(peaks)).prediction.peak == min(peaks)
    with pytest.raises(PlanError, match=r"memory is .* MB, which no plan keeps .* the least that does is .* MB"):
        fitting(found, min(peaks) - 1)


def test_budgets():
    assert [read_budget(text) for text in ("12GB", "7.5 GiB", "8e9", "500mb")] == [12e9, 7.5 * 2**30, 8e9, 5e8]
    for nbytes in (1, 12_345_678, 999_999_999, 2_357_111_317):
        assert nbytes <= read_budget(amount(nbytes)) < 1.01 * nbytes + 10_000
    for text in ("", "twelve", "0GB", "-1GB", "12 apples", "1.2.3GB"):
        with pytest.raises(PlanError, match="it must be an amount such as 12GB"):
            read_budget(text)


def test_a_call_for_more_than_was_planned_warns(job):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_more(None, job.settings, 2)
        warn_of_more(job.settings, job.settings, 1)
        warn_of_more(job.settings, replace(job.settings, num_frames=1, guidance_scale=1.0), 1)
    with pytest.warns(UserWarning, match="the video has 17 frames of 64 x 64, the one planned 9 .* as planned_for"):
        warn_of_more(job.settings, replace(job.settings, num_frames=17), 1)
    with pytest.warns(UserWarning, match="2 videos are made at once, one was planned"):
        warn_of_more(job.settings, job.settings, 2)


@pytest.mark.soak
def test_a_pipeline_keeps_to_its_memory(job):
    least = {}
    for form in (None, "int8"):
        on_cpu = replace(job, dtype=torch.float32, target="cpu", numerics=SAT, weights=form)
        least[form] = min(choice.prediction.peak for choice in choices(Pipeline, on_cpu))
    assert least["int8"] <= least[None]  # equal where the VAE is what holds most
    with pytest.raises(PlanError, match=r"memory is 1.00 MB, which no plan keeps .* the least that does is "):
        Pipeline.from_pretrained("tiny", device="cpu", memory="1MB", planned_for=job.settings)
    settings = {"num_inference_steps": 4, "num_frames": 9, "seed": 0, "progress": False}
    for form, budget in least.items():
        how = {"memory": str(budget), "weights": form, "planned_for": job.settings}
        pipeline = Pipeline.from_pretrained("tiny", device="cpu", **how)
        assert pipeline.placed.plan.weights == form
        assert pipeline("a red circle", **settings).frames.shape == (9, 64, 64, 3)
    assert Pipeline.from_pretrained("tiny", device="cpu", memory="auto").placed.plan == Plan()


def test_stored_weights_are_tried_before_those_in_eight_bits(monkeypatch):
    """Which take less: a fake table of peaks in the place of the runs, the order is what is tested."""
    asked = []

    def peaks(make, job, known=None):
        asked.append(job.weights)
        least = 10 if job.weights is None else 5
        return [Choice(Plan(place, place, weights=job.weights), at(least + more))
                for more, place in ((2, "visiting"), (0, "streamed"))]  # fmt: skip

    def at(peak):
        return Prediction({"decode": Stage(peak, 0)}, {}, {})

    monkeypatch.setattr(choose, "choices", peaks)
    monkeypatch.setattr(choose, "predict", lambda make, job, plan: at(20 if plan.weights is None else 15))
    job = Job(None, None, torch.float32)
    for budget, form, place, runs in (
        (20, None, "resident", []),
        (12, None, "visiting", [None]),
        (10, None, "streamed", [None]),
        (9, "int8", "visiting", [None, "int8"]),
        (5, "int8", "streamed", [None, "int8"]),
    ):
        asked.clear()
        plan = choose.choose(Pipeline, job, budget).plan
        assert (plan.weights, plan.transformer, asked) == (form, place, runs), budget
    assert choose.choose(Pipeline, replace(job, eight_bits="fp8"), 5).plan.weights == "fp8"
    asked.clear()
    assert choose.choose(Pipeline, replace(job, weights="fp8"), 15).plan == Plan(weights="fp8") and not asked
    with pytest.raises(PlanError, match=r"the least that does is .* streamed; .* weights in int8"):
        choose.choose(Pipeline, job, 4)
