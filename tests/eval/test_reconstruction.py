"""PSNR of a VAE over held-out clips."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cogvx.config import VAEConfig
from cogvx.data.shapes import HELD_OUT_SCENES, SIZES
from cogvx.eval.reconstruction import evaluate_reconstruction, held_out_clips, psnr, reconstruct
from cogvx.eval.shapes import compare, read_clip
from cogvx.models.vae import CausalVAE


class Contrast(nn.Module):
    """A known loss: the decoder scales contrast and adds 0.3 levels; what leaves [-1, 1] is the caller's to clamp."""

    def __init__(self, factor: float, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=dtype))

    def encode(self, video):
        assert video.shape[1:] == (3, 17, 64, 64) and video.min() >= -1 and video.max() <= 1
        assert video.dtype == self.factor.dtype
        return SimpleNamespace(mode=lambda: video)

    def decode(self, latents):
        return latents * self.factor + 0.3 / 127.5


@pytest.fixture(scope="module")
def small_vae():
    torch.manual_seed(0)
    return CausalVAE(
        VAEConfig(block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4)
    )


def test_psnr_by_hand():
    zeros = np.zeros((2, 5), np.uint8)
    assert psnr(zeros, zeros + np.uint8(1)) == pytest.approx(48.1308, abs=1e-4)  # 20 log10(255)
    assert psnr(zeros, zeros + np.uint8(255)) == psnr(zeros + np.uint8(255), zeros) == 0.0  # differences do not wrap
    assert psnr(zeros, zeros) == pytest.approx(58.1308, abs=1e-4)  # as if one of the ten values were one level off


@pytest.mark.parametrize(("factor", "dtype"), [(0.5, torch.float32), (1.5, torch.float32), (0.5, torch.bfloat16)])
def test_known_losses_are_measured(factor, dtype):
    found = evaluate_reconstruction(Contrast(factor, dtype), num_clips=5, seed=3, batch_size=2)
    expected = []
    for clip in held_out_clips(5, seed=3):
        video = torch.from_numpy(clip).float() / 127.5 - 1
        video = (video.to(dtype) * torch.tensor(factor, dtype=dtype) + 0.3 / 127.5).float()
        again = np.clip(np.rint((video.numpy() + 1) * 127.5), 0, 255)
        expected.append(-10 * np.log10(((clip.astype(float) - again) ** 2).mean() / 255**2))
    assert found.psnr == pytest.approx(expected, abs=1e-6)
    assert found.mean == pytest.approx(sum(expected) / 5)


def test_a_perfect_vae_is_near_perfect():
    assert evaluate_reconstruction(Contrast(1.0), num_clips=3).mean > 100


def test_clips_are_held_out_in_turn_and_of_every_size():
    readings = [read_clip(clip) for clip in held_out_clips(96, seed=1)]
    assert all(compare(reading, scene).all_right for reading, scene in zip(readings, HELD_OUT_SCENES * 2, strict=True))
    moving = [reading.size for reading in readings if reading.motion.startswith("moves")]
    assert all(moving.count(size) >= len(moving) / 4 for size in SIZES)


def test_a_clip_depends_on_seed_and_index_alone():
    clips = held_out_clips(5, seed=1)
    assert all((a == b).all() for a, b in zip(clips[:3], held_out_clips(3, seed=1), strict=True))
    assert all((a != b).any() for a, b in zip(clips, held_out_clips(5, seed=2), strict=True))


def test_batches_do_not_change_a_real_vae(small_vae):
    together = evaluate_reconstruction(small_vae, num_clips=3, batch_size=3)
    alone = evaluate_reconstruction(small_vae, num_clips=3, batch_size=1)
    assert together.psnr == pytest.approx(alone.psnr, abs=0.02) and 0 < together.mean < 30


def test_reconstruction_uses_the_mode(small_vae):
    clip = held_out_clips(1)[0]
    first, again = reconstruct(small_vae, [clip])[0], reconstruct(small_vae, [clip])[0]
    assert first.shape == clip.shape and first.dtype == np.uint8 and (first == again).all()


@pytest.mark.parametrize("name", ["num_clips", "batch_size"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0, which is less than 1"):
        evaluate_reconstruction(Contrast(1.0), **{name: 0})
