import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvx.config import TransformerConfig, VAEConfig
from cogvx.data.latents import encode_ends, encode_shapes, load_shapes
from cogvx.models.transformer import ExpertTransformer
from cogvx.models.vae import CausalVAE
from cogvx.pipeline import Pipeline
from cogvx.settings import Configs
from cogvx.train import transformer as training
from cogvx.train.tokenizer import build_tokenizer
from cogvx.train.transformer import TransformerTraining, embed, prepare, tiny_text_encoder, train, widen

WORDS = ["a", "red", "green", "moves", "left", "right", "on", "black", "background", "circle"]
SMALL = TransformerConfig(
    num_attention_heads=1, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1, time_embed_dim=8,
    text_embed_dim=16, max_text_seq_length=8, sample_width=8, sample_height=8, sample_frames=17,
    use_rotary_positional_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    vae = CausalVAE(
        VAEConfig(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=4)
    )
    encode_shapes(vae, folder / "latents", 64, seed=0)
    encode_ends(vae, folder / "ends", 64, seed=0)
    build_tokenizer(folder / "tokenizer", WORDS, 8)
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def run(data, tmp_path):
    return TransformerTraining(
        latents=data / "latents", tokenizer=data / "tokenizer", out=tmp_path, num_steps=4, batch=4, num_warmup=1,
        num_decay=2, save_every=2, config=SMALL,
    )  # fmt: skip


@pytest.fixture
def from_images(data, run, tmp_path):
    """A run that goes on from a saved text-to-video model of two layers with its second one, shown images."""
    config = dataclasses.replace(SMALL, num_layers=2)
    model, text = ExpertTransformer(config).init_for_training(), tiny_text_encoder(run)
    vae = CausalVAE.from_pretrained(data / "vae")
    Pipeline(model, vae, text, Configs(config, vae.config, run.schedule)).save_pretrained(tmp_path / "from")
    return dataclasses.replace(
        run, out=tmp_path / "out", start_from=tmp_path / "from", layers=(1,), ends=data / "ends", muon_lr=0.0,
        bf16=False, config=dataclasses.replace(SMALL, in_channels=8),
    )  # fmt: skip


def test_the_ends_are_those_of_the_clips_each_with_noise_of_its_own(data):
    mean, std, prompts = load_shapes(data / "ends")
    clips, _, of_clips = load_shapes(data / "latents")
    assert mean.shape == std.shape == (64, 4, 4, 8, 8) and prompts == of_clips
    first, again = mean[:, :, 0].float(), mean[:, :, 2].float()
    noise, apart = (first - again).norm(), (first - first.roll(1, 0)).norm()
    assert 0 < noise < 0.8 * apart  # one picture, noisy twice
    # The first frame is a latent frame alone, so that a clip's first latents are those of its picture, but for noise.
    assert (first - clips[:, :, 0].float()).norm() < 0.8 * apart
    assert (mean[:, :, 1].float() - first).norm() > noise


def test_a_wider_model_begins_as_the_layers_it_takes(run):
    torch.manual_seed(0)
    source = ExpertTransformer(dataclasses.replace(SMALL, num_layers=3)).eval()
    model = ExpertTransformer(dataclasses.replace(SMALL, num_layers=2, in_channels=8)).eval()
    widen(model, source, (0, 2), share=0.5)
    del source.transformer_blocks[1]
    latents, text, timestep = torch.randn(2, 8, 5, 8, 8), torch.randn(2, 8, 16), torch.tensor([3, 900])
    both = latents[:, :4] + 0.5 * latents[:, 4:]
    with torch.no_grad():
        torch.testing.assert_close(model(latents, text, timestep), source(both, text, timestep))


def test_without_layers_a_model_begins_with_all_of_the_others_if_it_has_as_many():
    source, model = (ExpertTransformer(dataclasses.replace(SMALL, num_layers=2)) for _ in range(2))
    widen(model, source, ())
    assert all(torch.equal(weight, source.state_dict()[name]) for name, weight in model.state_dict().items())
    for layers, named in (((), r"\(0, 1\)"), ((0, 1), r"\(0, 1\)"), ((2,), r"\(2,\)"), ((-1,), r"\(-1,\)")):
        with pytest.raises(ValueError, match=f"layers is {named}; it must name 1 of 0 to 1, those of start_from's"):
            widen(ExpertTransformer(SMALL), source, layers)


def test_what_is_shown_is_the_first_frame_in_some_samples_the_last_and_in_some_batches_nothing(from_images):
    _, text, clips, _ = prepare(from_images)
    assert not any(weight.requires_grad for weight in text.model.parameters())
    generator, rows = torch.Generator().manual_seed(0), np.arange(64)
    clips.ends = clips.ends[0], torch.zeros_like(clips.ends[1])  # the means, to compare with
    images = torch.stack([clips.draw_image(rows, from_images, generator) for _ in range(100)])  # [100, 64, C, T, H, W]
    shown = images.abs().flatten(4).amax(4).amax(2) > 0  # [100, 64, T]
    given = shown.any(2).any(1)
    assert 85 <= given.sum() <= 99 and not shown[:, :, 1:-1].any() and shown[given, :, 0].all()
    assert 0.22 < shown[given, :, -1].float().mean() < 0.28
    draws = clips.scaling * clips.ends[0].float()[:, :, [[0, 2], [1, 3]]]  # [64, C, 2 ends, 2 draws, H, W]
    for end, frame in enumerate((0, -1)):
        off = (images[given][:, :, :, frame, None] - draws[:, :, end]).abs().amax((2, 4, 5))  # [batches, 64, 2]
        assert (off.amin(2)[shown[given, :, frame]] < 1e-6).all()
    with pytest.raises(ValueError, match="whose clips are not the first of"):
        other = from_images.out / "other"
        other.mkdir(parents=True)
        content = load_file(from_images.ends / "00000.safetensors")
        save_file(content, other / "0.safetensors", {"prompts": json.dumps(["a red circle"] * 64)})
        prepare(dataclasses.replace(from_images, ends=other))


def test_an_image_models_ends_must_be_named(from_images):
    with pytest.raises(ValueError, match="ends is None; with 8 input channels for 4 of latents it must be a folder"):
        train(dataclasses.replace(from_images, ends=None))


def killed_at_its_second_save(run: TransformerTraining) -> None:
    """Train until the first state is on disk, and steps after it are computed and logged."""

    class Killed(Exception):
        pass

    def save_once(*args):
        if list(run.out.glob("step-*")):
            raise Killed
        save(*args)

    with pytest.MonkeyPatch.context() as patch:
        save = training.save_state
        patch.setattr(training, "save_state", save_once)
        with pytest.raises(Killed):
            train(run)
    assert [path.name for path in run.out.glob("step-*")] == [f"step-{run.save_every:07d}"]


def rows(run: TransformerTraining) -> list[dict]:
    lines = (run.out / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_training_from_another_model_leaves_what_stands_still_and_resumes_exactly(from_images):
    from_images = dataclasses.replace(from_images, frozen=(".ff.",))
    before = prepare(from_images)[1].model.state_dict()
    model, text, scaling = train(from_images)
    assert scaling == VAEConfig().scaling_factor and model.config.in_channels == 8
    assert all(torch.equal(weight, before[name]) for name, weight in text.model.state_dict().items())
    embed = model.patch_embed.proj.weight  # it learns to look at the image
    assert not torch.allclose(embed[:, 4:], 0.3 * embed[:, :4], rtol=1e-3)
    source = ExpertTransformer.from_pretrained(from_images.start_from).state_dict()
    still = {name: torch.equal(weight, source[name.replace("blocks.0.", "blocks.1.")])
             for name, weight in model.transformer_blocks.named_parameters(prefix="transformer_blocks")}  # fmt: skip
    assert all(still[name] for name in still if ".ff." in name) and not all(still.values())
    halves = dataclasses.replace(from_images, out=from_images.out.with_name("halves"))
    killed_at_its_second_save(halves)
    again, _, _ = train(halves)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_encoding_twice_changes_nothing(data):
    mean, std, prompts = load_shapes(data / "latents")
    assert mean.shape == std.shape == (64, 4, 5, 8, 8)
    assert len(prompts) == 64 and all(prompt.startswith("a ") for prompt in prompts)
    before = (data / "latents" / "00000.safetensors").stat().st_mtime_ns
    encode_shapes(None, data / "latents", 64, seed=0)  # no VAE is needed where all is there
    assert (data / "latents" / "00000.safetensors").stat().st_mtime_ns == before
    for encode in (encode_shapes, encode_ends):
        with pytest.raises(ValueError, match="num_clips is 65; it must be a multiple of 64"):
            encode(None, data / "latents", 65, seed=0)


def test_no_latents_are_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="holds no encoded clips"):
        load_shapes(tmp_path)


def test_a_stopped_run_resumes_exactly(run):
    whole, text, _ = train(run)
    halves_run = dataclasses.replace(run, out=run.out / "halves")
    killed_at_its_second_save(halves_run)
    halves, halves_text, _ = train(halves_run)
    for ours, theirs in ((whole, halves), (text.model, halves_text.model)):
        for name, weight in ours.state_dict().items():
            assert torch.equal(weight, theirs.state_dict()[name]), name
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4] and rows(halves_run) == rows(run)
    assert all(row["loss"] > 0 and row["gradient"] > 0 for row in rows(run))


def test_a_share_of_the_prompts_is_dropped_half_to_zeros_half_to_the_empty_prompt(run):
    text = tiny_text_encoder(run)
    tokens = text.tokenize(["", "a red circle"])
    rows = torch.ones(2000, dtype=torch.long).numpy()
    with torch.no_grad():
        empty, prompt = text.model(tokens).last_hidden_state
        embedded = embed(text.model, tokens, rows, 0.1, torch.Generator().manual_seed(0))
    zeros = (embedded == 0).flatten(1).all(1).sum().item()
    empties = torch.isclose(embedded, empty, atol=1e-5).flatten(1).all(1).sum().item()
    prompts = torch.isclose(embedded, prompt, atol=1e-5).flatten(1).all(1).sum().item()
    assert zeros + empties + prompts == 2000
    assert 70 <= zeros <= 130 and 70 <= empties <= 130  # 100 each, three standard deviations
