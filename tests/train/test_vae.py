import dataclasses
import json

import pytest
import torch

from cogvx.config import VAEConfig
from cogvx.train import vae as training
from cogvx.train.vae import Stage, VAETraining, train

SMALL = VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4)


def short_run(folder, *stages: Stage) -> VAETraining:
    return VAETraining(out=folder, stages=stages, num_warmup=2, num_decay=(2, 2), save_every=2, config=SMALL)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_stopped_run_resumes_exactly(tmp_path):
    stages = (
        Stage(num_frames=1, batch=2, num_steps=2),
        Stage(num_frames=1, batch=2, num_steps=2, decoder_only=True, adversarial=True),
    )
    whole = train(short_run(tmp_path / "whole", *stages))

    class Killed(Exception):
        pass

    def save_once(folder, step, trees):
        if step > 2:  # steps 3 and 4 are logged then, and not saved
            raise Killed
        save(folder, step, trees)

    with pytest.MonkeyPatch.context() as patch:
        save = training.save_state
        patch.setattr(training, "save_state", save_once)
        with pytest.raises(Killed):
            train(short_run(tmp_path / "halves", *stages))
    halves = train(short_run(tmp_path / "halves", *stages))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, halves.state_dict()[name]), name
    without_time = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path / n)] for n in ("whole", "halves")
    ]
    assert without_time[0] == without_time[1]


def test_the_encoder_stands_still_when_only_the_decoder_is_trained(tmp_path):
    first = train(short_run(tmp_path / "first", Stage(1, 2, 1)))
    before = {name: weight.clone() for name, weight in first.state_dict().items()}
    run = short_run(tmp_path / "first", Stage(1, 2, 1), Stage(1, 2, 1, decoder_only=True))
    after = train(dataclasses.replace(run)).state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("encoder"))
    assert not any(
        torch.equal(before[n], after[n]) for n in before if n.startswith("decoder") and n.endswith("conv1.conv.weight")
    )


def test_a_run_goes_on_with_the_discriminators_rate_that_it_is_given(tmp_path, monkeypatch):
    rates, step = [], training.discriminator_step

    def noted(discriminator, optimiser, *others):
        rates.append(optimiser.param_groups[0]["lr"])
        return step(discriminator, optimiser, *others)

    monkeypatch.setattr(training, "discriminator_step", noted)
    for num_steps, rate in ((1, 2e-4), (2, 3e-5)):
        run = short_run(tmp_path, Stage(num_frames=1, batch=2, num_steps=num_steps, adversarial=True))
        train(dataclasses.replace(run, discriminator_lr=rate))
    assert rates == [2e-4, 3e-5]


def test_every_loss_term_is_logged_and_the_perceptual_one_where_a_backbone_is_given(tmp_path):
    stage = Stage(num_frames=9, batch=1, num_steps=1, adversarial=True)
    train(short_run(tmp_path / "plain", stage))
    train(short_run(tmp_path / "perceptual", stage), perceptual=lambda output, video: (output - video).square().mean())
    plain, perceptual = rows(tmp_path / "plain")[0], rows(tmp_path / "perceptual")[0]
    assert {"step", "psnr", "kl", "adversarial", "judge", "gradient", "seconds"} == plain.keys()
    assert plain.keys() | {"perceptual"} == perceptual.keys()
    assert plain["gradient"] != perceptual["gradient"]


def test_a_step_that_is_not_finite_stops_before_it_changes_a_weight(tmp_path):
    run = short_run(tmp_path, Stage(1, 2, 1))
    with pytest.raises(RuntimeError, match="non-finite"):
        train(run, perceptual=lambda output, video: output.mean() * float("nan"))
    assert not list(tmp_path.glob("step-*"))


def test_learning_lowers_the_error(tmp_path):
    train(dataclasses.replace(short_run(tmp_path, Stage(1, 4, 30)), save_every=100))
    errors = [row["psnr"] for row in rows(tmp_path)]
    assert sum(errors[-5:]) / 5 > sum(errors[:5]) / 5 + 2.0
