"""The checkpoint inside the package: diffusers loads the same folder, and it does what a prompt says."""

import numpy as np
import pytest
import torch

from cogvx import Pipeline
from cogvx.data.shapes import parse
from cogvx.eval.shapes import judge
from cogvx.models.checkpoint import TINY

pytestmark = pytest.mark.skipif(
    not (TINY / "transformer").is_dir(), reason=f"{TINY} holds no checkpoint; `make tiny` trains it"
)

PROMPTS = [
    "a large red circle moves left on a black background",
    "a small yellow square moves right on a navy background",
    "a cyan triangle grows on a gray background",
    "a large white circle moves down on a navy background",
]


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.from_pretrained("tiny", device="cpu", numerics="diffusers")


def test_fits_into_the_package():
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".model"}
    index = {path.name for path in TINY.iterdir()}
    assert index == {"model_index.json", "transformer", "vae", "text_encoder", "tokenizer", "scheduler"}


@pytest.mark.slow
def test_diffusers_loads_the_same_folder_and_makes_the_same_frames_from_the_same_noise(pipeline):
    from diffusers import CogVideoXPipeline

    theirs = CogVideoXPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(5))
    mine = pipeline(PROMPTS[0], latents=noise, num_inference_steps=20, progress=False).frames
    video = theirs(
        PROMPTS[0], latents=noise.transpose(1, 2), num_inference_steps=20, num_frames=17, height=64, width=64,
        max_sequence_length=theirs.transformer.config.max_text_seq_length, output_type="np",
    ).frames[0]  # fmt: skip
    other = (video * 255).round().astype(np.uint8)
    assert mine.shape == other.shape == (17, 64, 64, 3)
    assert (np.abs(mine.astype(int) - other.astype(int)) <= 1).mean() >= 0.999


@pytest.mark.slow
def test_a_few_prompts_are_obeyed():
    clips = Pipeline.from_pretrained("tiny", device="cpu").batch(
        PROMPTS, seed=0, batch_size=len(PROMPTS), progress=False
    )
    verdicts = {prompt: judge(clip.frames, parse(prompt)) for prompt, clip in zip(PROMPTS, clips, strict=True)}
    assert sum(verdict.all_right for verdict in verdicts.values()) >= len(PROMPTS) - 1, verdicts
