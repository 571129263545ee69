"""Long clips need no more memory than short ones: chunks are decoded, written and forgotten one by one."""

import pytest
import torch

from cogvx import Pipeline
from cogvx.finite import NonFiniteError
from cogvx.inputs import Inputs
from cogvx.machine import peak_of_tensors
from cogvx.numerics import DIFFUSERS
from cogvx.start import video_latents

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline(small_checkpoint):
    return Pipeline.from_pretrained(small_checkpoint("5b"), numerics="diffusers")


def test_decoding_161_frames_holds_no_more_than_49(pipeline):
    def peak(num_latents: int) -> int:
        latents = torch.randn(1, 4, num_latents, 6, 8)
        frames = 0

        def decode() -> None:
            nonlocal frames
            for part in pipeline.decode_each(latents):
                frames += part.shape[1]

        held = peak_of_tensors(decode, CPU) - latents.nbytes  # its own copy, scaled, is all that grows
        assert frames == 4 * num_latents - 3
        return held

    assert peak(41) <= 1.001 * peak(13)


def test_encoding_161_frames_holds_no_more_than_49(pipeline):
    def peak(num_frames: int) -> int:
        inputs = Inputs.read(video=torch.zeros(num_frames, 48, 64, 3, dtype=torch.uint8).numpy())
        latents = []

        def encode() -> None:
            latents.append(video_latents(inputs, (num_frames - 1) // 4 + 1, pipeline.vae, DIFFUSERS, None))

        with torch.inference_mode():
            held = peak_of_tensors(encode, CPU)
        return held - 8 * latents[0].nbytes  # moments, their parts, and the latents made of them

    assert peak(161) <= 1.001 * peak(49)


def test_a_written_video_is_the_saved_one(pipeline, tmp_path):
    settings = {"num_inference_steps": 2, "num_frames": 17, "seed": 3, "progress": False}
    video = torch.randint(0, 256, (17, 48, 64, 3), dtype=torch.uint8).numpy()
    mask = (video[..., 0] > 100).copy()
    for name, given in (("plain", {}), ("masked", {"video": video, "mask": mask})):
        pipeline("a red circle", **settings, **given).save(tmp_path / f"{name}.mp4")
        made = pipeline.write(tmp_path / f"{name} in parts.mp4", "a red circle", **settings, **given)
        assert made.path.read_bytes() == (tmp_path / f"{name}.mp4").read_bytes()
        assert made.metadata["seed"] == 3 and made.seconds > 0


def test_a_video_that_leaves_the_finite_numbers_late_leaves_no_file(pipeline, tmp_path, monkeypatch):
    latents = torch.randn(1, 4, 5, 6, 8)
    latents[:, :, 4] = torch.nan  # of the last chunk alone
    monkeypatch.setattr(pipeline, "make_latents", lambda *given: latents)
    with pytest.raises(NonFiniteError, match="in decoding"):
        pipeline.write(tmp_path / "a.mp4", "a red circle", num_inference_steps=2, num_frames=17, progress=False)
    assert not list(tmp_path.iterdir())
