import json
from pathlib import Path

import pytest
import torch

from cogvx.config import VAEConfig
from cogvx.data.latents import encode_shapes, load_shapes
from cogvx.models.checkpoint import TINY
from cogvx.models.transformer import ExpertTransformer
from cogvx.models.vae import CausalVAE
from cogvx.train import ladder, scaling
from cogvx.train.ladder import Ladder, climb, flops_of, folder_of, weights_of
from cogvx.train.ladder_report import findings, write
from cogvx.train.options import TrainingError
from cogvx.train.transformer import TransformerTraining, held_out, prepare


def test_the_weights_that_are_counted_are_those_of_the_blocks_products():
    for config, _ in Ladder(out="out", widths=(32, 48), layers=(1, 2), steps=(1, 2, 3, 4)).rungs():
        names = ("attn1.to", "ff.net")
        weights = ExpertTransformer(config).state_dict()
        counted = sum(w.numel() for name, w in weights.items() if any(n in name for n in names) and w.ndim == 2)
        assert counted == weights_of(config)


def test_the_rung_with_most_compute_is_the_last():
    rungs = Ladder(out="out").rungs()
    flops = [flops_of(config, steps) for config, steps in rungs]
    assert len(rungs) == 15 and max(flops) == flops[-1] and flops[-1] > 30 * flops[0]


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Of 64 clips, by a VAE that is fast and nothing else."""
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=16)
    folder = tmp_path_factory.mktemp("latents")
    encode_shapes(CausalVAE(config), folder, 64, seed=0)
    return folder


@pytest.mark.slow
def test_a_small_ladder_is_climbed_and_goes_on_where_it_stopped(latents, tmp_path, monkeypatch):
    run = Ladder(
        out=tmp_path / "out", latents=latents, held_out=8, widths=(16, 32), layers=(1, 1),
        steps=(1, 2, 3, 4), batch=2, draws=1,
    )  # fmt: skip
    predicted, trained = run.out / "prediction.json", []
    climbed_before = ladder.climbed

    def climbed(*args):
        trained.append(predicted.exists())
        return climbed_before(*args)

    monkeypatch.setattr(ladder, "climbed", climbed)
    monkeypatch.setattr(scaling, "RESAMPLED", 10)
    result = climb(run)
    assert trained == [False] * 7 + [True]  # before the last one alone
    losses = [rung["loss"] for rung in result["rungs"]]
    assert len(losses) == 8 and len(set(losses)) == 8 and all(0 < loss < 3 for loss in losses)
    said = json.loads((run.out / "prediction.json").read_text())
    assert (said["weights"], said["tokens"]) == (12 * 32**2, 4 * 2 * 112)
    before = {path: path.stat().st_mtime_ns for path in run.out.rglob("result.json")}
    assert climb(run) == result
    assert before == {path: path.stat().st_mtime_ns for path in run.out.rglob("result.json")}
    text = write(result, run.out)
    assert text == (run.out / "ladder.md").read_text() and text.count("\n|") == 9
    assert (run.out / "ladder.png").read_bytes()[:4] == b"\x89PNG" and findings(result).loss == said["loss"]


def test_held_out_clips_are_not_trained_on(latents, tmp_path):
    run = TransformerTraining(latents=latents, out=tmp_path, text_encoder=TINY, held_out=24)
    (_, _, given, prompts), (_, kept, others) = prepare(run), held_out(run)
    mean, _, every = load_shapes(latents)
    assert torch.equal(given.mean, mean[:40]) and torch.equal(kept.mean, mean[40:])
    assert prompts == every[:40] and others == every[40:]


@pytest.mark.parametrize(("change", "message"), [
    ({"layers": (1,)}, r"layers is \[1\]; there must be one for each of 5 widths"),
    ({"widths": (32, 40, 64, 96, 128)}, "widths is .* multiple of 16"),
    ({"steps": (0, 1)}, r"steps is \[0, 1\]; every one must be at least 1"),
    ({"steps": (1,)}, "5 widths and 1 steps make too few rungs; a law takes 6 besides the largest"),
    ({"batch": 0}, "batch is 0; it must be at least 1"),
    ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
    ({"seed": -1}, "seed is -1; it must be from 0"),
    ({"widths": (32, 64, 32), "layers": (2, 2, 2)}, r"widths is \[32, 64, 32\]; it must be each another"),
    ({"steps": (100, 316, 100)}, r"steps is \[100, 316, 100\]; it must be each another number"),
    ({"num_clips": 100, "held_out": 10}, "num_clips is 100; it must be a multiple of 64"),
    ({"num_clips": 256}, "held_out is 256; it must be below num_clips, 256"),
])  # fmt: skip
def test_sizes_that_cannot_work_are_named(change, message):
    with pytest.raises(TrainingError, match=message):
        Ladder(out="out", **change)


def test_a_width_may_come_again_with_other_layers_and_clips_that_are_there_are_as_many_as_they_are():
    run = Ladder(out=Path("out"), latents=Path("latents"), num_clips=0, widths=(32, 32, 64), layers=(1, 2, 2))
    assert len({folder_of(run, *rung) for rung in run.rungs()}) == 9
