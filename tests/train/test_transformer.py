import dataclasses
import json

import pytest
import torch

from cogvx.config import TransformerConfig, VAEConfig
from cogvx.data.latents import encode_shapes, load_shapes
from cogvx.models.vae import CausalVAE
from cogvx.train import transformer as training
from cogvx.train.tokenizer import build_tokenizer
from cogvx.train.transformer import TransformerTraining, embed, tiny_text_encoder, train

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
    build_tokenizer(folder / "tokenizer", WORDS, 8)
    return folder


@pytest.fixture
def run(data, tmp_path):
    return TransformerTraining(
        latents=data / "latents", tokenizer=data / "tokenizer", out=tmp_path, num_steps=4, batch=4, num_warmup=1,
        num_decay=2, save_every=2, config=SMALL,
    )  # fmt: skip


def test_encoding_twice_changes_nothing(data):
    mean, std, prompts = load_shapes(data / "latents")
    assert mean.shape == std.shape == (64, 4, 5, 8, 8)
    assert len(prompts) == 64 and all(prompt.startswith("a ") for prompt in prompts)
    before = (data / "latents" / "00000.safetensors").stat().st_mtime_ns
    encode_shapes(None, data / "latents", 64, seed=0)  # no VAE is needed where all is there
    assert (data / "latents" / "00000.safetensors").stat().st_mtime_ns == before


def test_no_latents_are_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="holds no encoded clips"):
        load_shapes(tmp_path)


def test_a_stopped_run_resumes_exactly(run):
    whole, text, _ = train(run)

    class Stopped(Exception):
        pass

    def stop_after_saving(*args):
        save(*args)
        raise Stopped

    halves_run = dataclasses.replace(run, out=run.out / "halves")
    with pytest.MonkeyPatch.context() as patch:
        save = training.save_state
        patch.setattr(training, "save_state", stop_after_saving)
        with pytest.raises(Stopped):
            train(halves_run)
    halves, halves_text, _ = train(halves_run)
    for ours, theirs in ((whole, halves), (text.model, halves_text.model)):
        for name, weight in ours.state_dict().items():
            assert torch.equal(weight, theirs.state_dict()[name]), name


def test_the_log_names_loss_and_gradient_of_every_step(run):
    train(run)
    log = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert all(row["loss"] > 0 and row["gradient"] > 0 for row in log)


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
