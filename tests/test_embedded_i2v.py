"""The image-to-video checkpoint inside the package: what it shares, diffusers' frames, and the figure that is kept."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from cogvx import Pipeline
from cogvx.data.shapes import parse, render
from cogvx.eval.generation import given_clip, judged_image_clip
from cogvx.eval.report import evaluate
from cogvx.eval.shapes import read_clip
from cogvx.extend import extend
from cogvx.models.checkpoint import SHARED, TINY, TINY_I2V, checkpoint_files

pytestmark = pytest.mark.skipif(
    not (TINY_I2V / "transformer").is_dir(), reason=f"{TINY_I2V} holds no checkpoint; `make tiny` trains it"
)

PROMPTS = [
    "a large red circle moves left on a black background",
    "a small yellow square moves right on a navy background",
    "a cyan triangle grows on a gray background",
    "a large white circle moves down on a navy background",
]
GUIDANCE = 1.0  # the image says enough
QUICK = {"num_inference_steps": 25, "guidance_scale": GUIDANCE, "progress": False}


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.from_pretrained("tiny-i2v", device="cpu", numerics="diffusers")


def psnr(ours, theirs):
    return 10 * np.log10(255**2 / np.square(ours.astype(float) - theirs).mean())


def test_both_checkpoints_fit_into_the_package_and_what_they_share_is_stored_once():
    sizes = [path.stat().st_size for folder in (TINY, TINY_I2V) for path in folder.rglob("*") if path.is_file()]
    assert sum(sizes) <= 32 * 2**20
    assert {path.name for path in TINY_I2V.iterdir()} == {"model_index.json", "transformer", "scheduler"}
    shared = [name for name in checkpoint_files(TINY_I2V) if name.split("/")[0] in SHARED]
    assert checkpoint_files(TINY_I2V)["transformer/frozen-diffusion_pytorch_model.safetensors"].is_relative_to(TINY)
    assert sorted(shared) == sorted(name for name in checkpoint_files(TINY) if name.split("/")[0] in SHARED)


@pytest.mark.slow
def test_what_is_saved_is_whole_and_diffusers_makes_the_same_frames_of_it(pipeline, tmp_path):
    from diffusers import CogVideoXImageToVideoPipeline

    pipeline.save_pretrained(tmp_path / "whole")
    alone = {name for name in checkpoint_files(TINY_I2V) if "frozen" not in name}
    assert set(checkpoint_files(tmp_path / "whole")) == alone
    theirs = CogVideoXImageToVideoPipeline.from_pretrained(tmp_path / "whole", torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    image = given_clip(parse(PROMPTS[0]), 0, 0)[0]
    noise = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(5))
    mine = pipeline(PROMPTS[0], image=image, latents=noise, num_inference_steps=20, seed=3, progress=False).frames
    video = theirs(
        prompt=PROMPTS[0], image=Image.fromarray(image), latents=noise.transpose(1, 2), num_inference_steps=20,
        num_frames=17, height=64, width=64, output_type="np", generator=torch.Generator().manual_seed(3),
        max_sequence_length=theirs.transformer.config.max_text_seq_length,
    ).frames[0]  # fmt: skip
    other = (video * 255).round().astype(np.uint8)
    assert mine.shape == other.shape == (17, 64, 64, 3)
    assert (np.abs(mine.astype(int) - other.astype(int)) <= 1).mean() >= 0.999


@pytest.mark.slow
def test_the_figure_of_the_image_is_kept(pipeline):
    kept = []
    for index, scene in enumerate(map(parse, PROMPTS)):
        given = given_clip(scene, 0, index)
        clip = pipeline(scene.prompt, image=given[0], seed=index, **QUICK)
        kept.append(judged_image_clip(clip.frames, given, scene, index, compress=False)["right"])
    assert sum(right["kept"] for right in kept) >= len(PROMPTS) - 1, kept


@pytest.mark.soak
def test_the_figure_of_the_image_is_kept_in_nine_clips_of_ten():
    report = evaluate("tiny-i2v", num_prompts=96, num_clips=0, guidance_scale=GUIDANCE, progress=False)
    assert report.reached, str(report)


@pytest.mark.slow
def test_start_and_end_frame_are_met(pipeline):
    given = given_clip(parse(PROMPTS[0]), 0, 0)
    first, last = given[0], given[-1]
    alone, both = (pipeline(PROMPTS[0], image=first, seed=1, **more, **QUICK).frames
                   for more in ({}, {"last_image": last}))  # fmt: skip
    assert psnr(both[0], first) > 20 and psnr(both[-1], last) > 20, (psnr(both[0], first), psnr(both[-1], last))
    assert psnr(both[-1], last) > psnr(alone[-1], last)
    wanted, reading = read_clip(given), read_clip(both)
    assert reading.travel == pytest.approx(wanted.travel, abs=4) and reading.motion == "moves left"


@pytest.mark.slow
@pytest.mark.parametrize("index", range(2))
def test_a_clip_goes_on_as_it_moved(index, pipeline):
    scene = parse(("a small red circle moves left on a black background",
                   "a small white square moves down on a navy background")[index])  # fmt: skip
    video = render(scene, np.random.default_rng(3 + index))[:9]
    clip = extend(pipeline, video, scene.prompt, seed=1, num_frames=17, **QUICK)
    assert len(clip.frames) == 25 and np.array_equal(clip.frames[:9], video)
    figure = np.abs(clip.frames.astype(int) - clip.frames[0, 0, 0]).sum(-1) > 150
    rows, columns = np.array([[axis.mean() for axis in np.nonzero(frame)] for frame in figure]).T
    along, across = ((-columns, rows), (rows, columns))[index]
    steps = np.diff(along)
    usual = np.median(np.abs(steps))
    assert (steps[8:] > -0.5).all() and along[-1] - along[8] > 0.4 * (along[8] - along[0])
    assert abs(steps[8]) < 3 * usual and np.abs(np.diff(across)).max() < 2, (steps, usual)  # no jump at the joint


@pytest.mark.slow
@pytest.mark.parametrize("longer", ["windows", "riflex"])
def test_a_longer_clip_keeps_the_figure_and_has_no_seams(longer, pipeline):
    scene = parse("a small cyan circle moves right on a black background")
    image = render(scene, np.random.default_rng(2))[0]
    frames = pipeline(scene.prompt, image=image, num_frames=33, longer=longer, seed=2, **QUICK).frames
    assert frames.shape == (33, 64, 64, 3) and psnr(frames[0], image) > 20
    assert read_clip(frames[:17]).colour == read_clip(frames[16:]).colour == "cyan"
    changes = [np.abs(after.astype(int) - before).mean() for before, after in pairwise(frames)]
    assert max(changes) < 4 * np.median(changes), changes


@pytest.mark.slow
def test_inside_the_mask_is_made_anew_and_outside_stays(pipeline):
    old, new = (parse(f"a large {colour} circle moves left on a black background") for colour in ("red", "cyan"))
    video, repainted = (render(scene, np.random.default_rng(3)) for scene in (old, new))
    mask = np.pad((video != 0).any(axis=(0, 3)), 3)
    grown = np.stack([mask[i : i + 64, j : j + 64] for i in range(7) for j in range(7)]).any(0)
    clip = pipeline(new.prompt, image=repainted[0], video=video, mask=grown, strength=1.0, seed=1, **QUICK)
    outside = np.abs(clip.frames[:, ~grown].astype(int) - video[:, ~grown])
    assert outside.max() <= 1
    assert read_clip(clip.frames).colour == "cyan"
