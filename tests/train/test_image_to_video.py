"""Image to video: what is shown of an image, how often, that it is learnt from, and models of the wrong task."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from cogvx.config import ScheduleConfig, TransformerConfig
from cogvx.data.clips import find_clips
from cogvx.data.shapes import parse, render
from cogvx.data.video import read_video, write_video
from cogvx.diffusion.schedule import cumulative_alphas
from cogvx.inputs import Inputs, planned
from cogvx.models.checkpoint import TINY_I2V
from cogvx.models.transformer import ExpertTransformer
from cogvx.pipeline import Pipeline
from cogvx.settings import Settings
from cogvx.start import prepare
from cogvx.train.finetune import train
from cogvx.train.finetuning import Finetuning, Optimiser, configs_of, examples_of
from cogvx.train.options import TrainingError
from cogvx.train.sampling import Draws, Example

CONFIG = TransformerConfig(
    num_attention_heads=4, attention_head_dim=16, in_channels=8, out_channels=4, num_layers=1, time_embed_dim=8,
    text_embed_dim=16, max_text_seq_length=8, sample_width=8, sample_height=8, sample_frames=17,
    use_rotary_positional_embeddings=True,
)  # fmt: skip


def options(folder, **changes) -> Finetuning:
    run = Finetuning(
        data=folder, out=folder / "run", num_steps=40, batch=8, save_every=200, precision="fp32", kind="transformer",
        optimiser=Optimiser(lr=1e-2, num_warmup=1), device="cpu",
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def examples(count: int = 3) -> list[Example]:
    """Clips that stand still, each a picture of its own, which is drawn in three slightly different ways."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        picture = torch.randn(4, 1, 4, 4, generator=generator)
        images = picture[:, 0] + 0.01 * torch.arange(3.0).view(3, 1, 1, 1), torch.full((3, 4, 4, 4), 1e-3)
        clip = picture.expand(-1, 3, -1, -1).contiguous()
        found.append(Example(clip, torch.full_like(clip, 1e-3), torch.randn(5, 16, generator=generator), images))
    return found


def draws(**changes) -> Draws:
    plain = Draws(CONFIG, ScheduleConfig(), 0.7, torch.zeros(5, 16), 1.0, 0)
    return dataclasses.replace(plain, **changes)


def losses_of(out) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two clips of Shapes World with their captions, their colours inverted, which the embedded model never saw."""
    folder = tmp_path_factory.mktemp("shapes")
    prompts = "a large red circle moves left on a black background", "a cyan triangle grows on a gray background"
    for i, prompt in enumerate(prompts):
        write_video(folder / f"{i}.mp4", 255 - render(parse(prompt), np.random.default_rng(i)), 8)
        (folder / f"{i}.txt").write_text(prompt)
    return folder


@pytest.mark.parametrize(
    ("kind", "numerics"),
    [("5b-i2v", "sat"), ("1.5-5b-i2v", "sat"), ("1.5-5b-i2v", "diffusers"),
     ("1.5-5b-i2v", "sat,image_latent_1_5=multiplied")],
)  # fmt: skip
def test_what_is_shown_is_bit_for_bit_what_a_pipeline_shows_of_the_same_image(
    kind, numerics, clips, small_checkpoint, tmp_path
):
    folder = str(small_checkpoint(kind))
    run = options(tmp_path, model=folder, data=clips, numerics=numerics, image_draws=0)
    pipeline = Pipeline.from_pretrained(folder, numerics=numerics, device="cpu")
    found = find_clips(clips, (16, 16)).clips
    known, how = examples_of(run, found, configs_of(run))
    for i, (example, clip) in enumerate(zip(known, found, strict=True)):
        given = Inputs.read(image=read_video(clip.file)[0][0])
        settings = Settings("any", num_frames=17, height=64, width=64, seed=i, num_inference_steps=2)
        settings, given = planned(settings, given, pipeline.configs, pipeline.numerics)
        wanted = prepare([settings], given, pipeline.steps(2), pipeline.vae, pipeline.configs, pipeline.numerics).image
        (mean,), (std,) = example.images
        ours = how.placed(mean, std, wanted.shape[2], torch.Generator().manual_seed(i))
        assert ours.any() and torch.equal(ours, wanted[0])
        # In a step it stands behind as many latents as the pipeline makes, of which 1.5 fills the first up.
        assert how.step([example], 0, 1)[0].sample.latents.shape == (8, *wanted.shape[2:])


def test_a_dropped_caption_becomes_what_the_numerics_guide_with_unless_the_run_says_what(
    clips, small_checkpoint, tmp_path
):
    folder = str(small_checkpoint("2b"))
    pipeline = Pipeline.from_pretrained(folder, device="cpu", dtype=torch.float32)
    wanted = {"zeros": torch.zeros(16, 24), "encoded": pipeline.text_encoder.encode([""])[0]}
    for numerics, chosen, name in (
        ("sat", None, "zeros"), ("sat,null_text=encoded", None, "encoded"), ("diffusers", None, "encoded"),
        ("diffusers", "zeros", "zeros"), ("sat", "encoded", "encoded"),
    ):  # fmt: skip
        run = options(tmp_path, model=folder, data=clips, numerics=numerics, null_text=chosen)
        assert torch.equal(examples_of(run, [], configs_of(run))[1].null_text, wanted[name]), (numerics, chosen)


def test_every_draw_of_an_image_is_seen_equally_often_and_the_published_share_is_dropped():
    how, shown = draws(drop_image=Finetuning.drop_image), []
    for step in range(4):
        shown += [each.sample.latents[4:] for each in how.step(examples(), step, 500)]
    shown = torch.stack(shown)  # [2000, C, T, H, W]
    seen = shown.flatten(1).any(1)
    assert 70 <= (~seen).sum() <= 130  # 100, three standard deviations
    assert not shown[:, :, 1:].any() and shown[seen, :, 0].flatten(1).all(1).all()
    wanted = 0.7 * torch.stack([each.images[0] for each in examples()]).flatten(0, 1)  # scaled as the clips are
    off = (shown[seen, None, :, 0] - wanted).abs().amax((2, 3, 4))
    assert (off.amin(1) < 0.005).all()
    counts = torch.bincount(off.argmin(1) % 3, minlength=3)
    assert (counts > 560).all()  # 633, three standard deviations


def test_a_model_learns_to_look_at_the_image(tmp_path):
    """Of single pictures, which it then knows, it soon predicts better than any could that see the noisy one alone."""
    known = [each._replace(mean=each.mean[:, :1], std=each.std[:, :1]) for each in examples(64)]
    torch.manual_seed(1)
    train(options(tmp_path), ExpertTransformer(CONFIG).init_for_training(), known, draws())
    losses = losses_of(tmp_path / "run")
    # Values of variance 0.7^2 at alpha a: the velocity's variance, given the noisy value, is 0.7^2 / (0.7^2 a + 1 - a).
    alphas = cumulative_alphas(ScheduleConfig())
    blind = float((0.49 / (0.49 * alphas + 1 - alphas)).mean())
    assert blind == pytest.approx(0.577, abs=0.001) and sum(losses[-10:]) / 10 < 0.6 * blind < losses[0]


def test_a_model_for_the_other_task_is_a_clear_error(tmp_path, small_checkpoint):
    for task, kind, message in (
        ("image_to_video", "2b", "has 4 input channels for 4 of latents, it is made for 'text_to_video'"),
        ("text_to_video", "5b-i2v", "has 8 input channels for 4 of latents, it is made for 'image_to_video'"),
    ):
        run = options(tmp_path, model=str(small_checkpoint(kind)), task=task)
        with pytest.raises(TrainingError, match=f"task is '{task}'; model .*{message}"):
            configs_of(run)


@pytest.mark.slow
@pytest.mark.skipif(not (TINY_I2V / "transformer").is_dir(), reason=f"{TINY_I2V} holds no checkpoint")
def test_the_embedded_checkpoint_is_tuned_to_two_clips_and_makes_videos(run_command, clips, tmp_path):
    words = (
        "train", "lora", "model=tiny-i2v", f"data={clips}", f"out={tmp_path / 'run'}", "device=cpu", "precision=fp32",
        "num_steps=8", "batch=2", "lora.rank=8", "lora.alpha=8", "optimiser.lr=5e-3", "optimiser.num_warmup=1",
    )  # fmt: skip
    status, out, err = run_command(*words)
    assert status == 0 and out == f"{tmp_path / 'run'}  step 8\n", err
    losses = losses_of(tmp_path / "run")
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3]), losses
    adapter = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    image = read_video(clips / "0.mp4")[0][0]
    frames = []
    for loras in ([], [(adapter, 1.0)]):
        pipeline = Pipeline.from_pretrained("tiny-i2v", device="cpu", loras=loras)
        clip = pipeline((clips / "0.txt").read_text(), image=image, seed=0, num_inference_steps=2, progress=False)
        frames.append(clip.frames)
    assert frames[0].shape == (17, 64, 64, 3) and not np.array_equal(*frames)
