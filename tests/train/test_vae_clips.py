import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from cogvx.config import VAEConfig
from cogvx.data.clips import find_clips
from cogvx.data.video import read_video, write_video
from cogvx.models.vae import CausalVAE
from cogvx.train import vae_clips
from cogvx.train.checkpoint import Saver, load_state
from cogvx.train.finetuning import Optimiser
from cogvx.train.losses import LossWeights
from cogvx.train.options import TrainingError
from cogvx.train.vae_clips import Frames, VAERun, crops, load_perceptual, train

SMALL = VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for name, size in (("a", (20, 24, 32)), ("b", (9, 16, 16)), ("c", (9, 8, 32))):
        write_video(folder / f"{name}.mp4", rng.integers(0, 256, (*size, 3), dtype=np.uint8), 8)
    report = find_clips(folder, (1, 1), 9, captions=False, least=(16, 16))
    assert report.faults == {"are smaller than 16 x 16 pixels": ["c.mp4"]}
    return report.clips


def options(folder, **changes) -> VAERun:
    given = {"num_frames": 9, "size": 16, "num_steps": 4, "save_every": 2, "precision": "fp32", "backbone": "random",
             "device": "cpu", "optimiser": Optimiser(lr=1e-3, num_warmup=1),
             "weights": LossWeights(adversarial_start=1)}  # fmt: skip
    return VAERun(data=folder, out=folder / "run", **(given | changes))


def vae() -> CausalVAE:
    torch.manual_seed(1)
    return CausalVAE(SMALL)


def rows(run: VAERun) -> list[dict]:
    lines = (run.out / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def after_sigterm(function):
    """The function, to be called when SIGTERM has just come."""

    def called(*given, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*given, **named)

    return called


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_goes_on_bit_by_bit(tmp_path, clips, monkeypatch):
    changes = {"ema_decay": 0.5, "precision": "bf16"}
    whole, halves = options(tmp_path / "a", **changes), options(tmp_path / "b", **changes, workers=2)
    wanted, first, second = vae(), vae(), vae()
    assert train(whole, wanted, clips, load_perceptual(whole)) == 4
    forward = vae_clips.forward

    def forward_and_stop(run, vae, judge, video, step, *others):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(run, vae, judge, video, step, *others)

    with monkeypatch.context() as patch:
        patch.setattr(vae_clips, "forward", forward_and_stop)
        assert train(halves, first, clips, load_perceptual(halves)) == 2
    assert not multiprocessing.active_children()
    assert train(halves, second, clips, load_perceptual(halves)) == 4
    for name, value in wanted.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert rows(whole) == rows(halves)
    assert "judge" not in rows(whole)[0] and all("judge" in row for row in rows(whole)[1:])  # from its start step on
    assert all({"psnr", "kl", "perceptual"} <= row.keys() for row in rows(whole))
    assert CausalVAE.from_pretrained(whole.out / "vae").config == SMALL


def test_sigterm_while_the_last_state_and_the_result_are_written_ends_nothing(tmp_path, clips, monkeypatch):
    ended = []
    monkeypatch.setattr(Saver, "wait", after_sigterm(Saver.wait))
    monkeypatch.setattr(vae_clips, "write_result", after_sigterm(vae_clips.write_result))
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))  # else it would end the tests
    try:
        run = options(tmp_path, num_steps=1, backbone=None, weights=LossWeights(adversarial_start=None))
        assert train(run, vae(), clips) == 1
        assert (run.out / "vae" / "config.json").exists() and load_state(run.out)[0] == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not ended


def as_read(video: torch.Tensor) -> torch.Tensor:  # [3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3]
    return ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


def test_crops_are_pieces_of_the_clips_at_one_of_the_strides(tmp_path, clips):
    run, kept, seen = options(tmp_path, batch=2), Frames(), set()
    videos = [torch.from_numpy(read_video(clip.file)[0]) for clip in clips]
    for crop in (as_read(each) for step in range(12) for each in crops(run, clips, kept, step)):
        for i, video in enumerate(videos):
            windows = video.unfold(1, 16, 1).unfold(2, 16, 1).permute(0, 1, 2, 4, 5, 3)  # [T, y, x, 16, 16, 3]
            for stride in (1, 2):
                starts = range(len(video) - 8 * stride)
                pieces = (windows[t : t + 8 * stride + 1 : stride] for t in starts)
                if any((piece == crop[:, None, None]).flatten(3).all(-1).all(0).any() for piece in pieces):
                    seen.add((i, stride))
    assert seen == {(0, 1), (0, 2), (1, 1)}  # the second clip is too short for every second frame


def test_fixed_crops_are_the_first_frames_of_the_centre(tmp_path, clips):
    run = options(tmp_path, crops="fixed", batch=2)  # both clips
    found = [as_read(crop) for crop in crops(run, clips, Frames(), 7)]
    wanted = [torch.from_numpy(read_video(clips[0].file)[0][:9, 4:20, 8:24]),
              torch.from_numpy(read_video(clips[1].file)[0])]  # fmt: skip
    assert all(any(torch.equal(each, other) for other in found) for each in wanted)


def test_as_many_clips_stay_in_memory_as_fit(clips, monkeypatch):
    read, files = [], [clip.file for clip in clips]  # 20 * 24 * 32 * 3 = 46,080 bytes, and 9 * 16 * 16 * 3 = 6,912
    monkeypatch.setattr(vae_clips, "read_video", lambda file: (read.append(file), read_video(file))[1])
    for held, wanted in ((52_992, [0, 1]), (52_991, [0, 1, 0, 1, 0]), (0, [0, 1, 0, 1, 0])):
        frames = Frames(held)
        for i in (0, 1, 1, 0, 1, 0, 0):
            assert (frames.of(files[i]) == read_video(files[i])[0]).all()
        assert read == [files[i] for i in wanted], held
        read.clear()


def test_a_clip_that_has_changed_is_read_again_by_the_next_run(tmp_path):
    rng, losses = np.random.default_rng(0), []
    for name in ("a", "b"):
        write_video(tmp_path / "clip.mp4", rng.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8), 8)
        run = options(tmp_path / name, num_steps=1, backbone=None, weights=LossWeights(adversarial_start=None))
        train(run, vae(), find_clips(tmp_path, (1, 1), 9, captions=False).clips)
        losses.append(rows(run)[0]["loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("non_finite", ["stop", "skip"])
def test_a_discriminator_that_is_not_finite_does_not_step(tmp_path, clips, monkeypatch, non_finite):
    run = options(tmp_path, num_steps=1, non_finite=non_finite, weights=LossWeights(adversarial_start=0))
    hinge = "cogvx.train.losses.discriminator_hinge"
    monkeypatch.setattr(hinge, lambda real, fake: (real.mean() + fake.mean()) * float("inf"))
    if non_finite == "stop":
        with pytest.raises(TrainingError, match=r"the discriminator's loss is .*; none of its weights was changed"):
            train(run, vae(), clips)
    else:
        assert train(run, vae(), clips) == 1 and rows(run)[-1]["skipped"] == 1


def test_a_run_goes_on_with_the_rates_that_it_is_given(tmp_path, clips, monkeypatch):
    rates, step = [], vae_clips.discriminator_step

    def noted(judge, optimiser, *others, **named):
        rates.append(optimiser.param_groups[0]["lr"])
        return step(judge, optimiser, *others, **named)

    monkeypatch.setattr(vae_clips, "discriminator_step", noted)
    changes = {"backbone": None, "weights": LossWeights(adversarial_start=0)}
    for num_steps, rate in ((1, 1e-4), (2, 3e-5)):
        train(options(tmp_path, num_steps=num_steps, discriminator_lr=rate, **changes), vae(), clips)
    assert rates == [1e-4, 3e-5]


@pytest.mark.slow
def test_training_lowers_the_error(tmp_path):
    frames = np.zeros((9, 16, 16, 3), np.uint8)
    frames[:, :, 8:] = 200
    write_video(tmp_path / "halves.mp4", frames, 8)
    clips = find_clips(tmp_path, (1, 1), 9, captions=False).clips
    run = options(tmp_path, num_steps=15, crops="fixed", backbone=None, save_every=100,
                  weights=LossWeights(adversarial_start=None), optimiser=Optimiser(lr=5e-3, num_warmup=1))  # fmt: skip
    train(run, vae(), clips)
    psnr = [row["psnr"] for row in rows(run)]
    assert sum(psnr[-5:]) / 5 > sum(psnr[:5]) / 5 + 1.0
