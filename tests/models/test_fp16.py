"""fp16 that does not overflow: weights scaled until a straightforward fp16 gives NaN, ours against float64."""

import importlib.util
from pathlib import Path

import pytest
import torch

from cogvx.models import CausalVAE, ExpertTransformer
from cogvx.models.embeddings import Placement
from cogvx.models.vae import decode_chunks
from cogvx_kernels.testing import assert_as_accurate

SPEC = importlib.util.spec_from_file_location("sat_networks", Path(__file__).with_name("sat_oracle.py"))
oracles = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(oracles)

KINDS = ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
# What overflows, and which weights are scaled by how much.
STRESSES = {
    "the stream": (("patch_embed.proj", "text_proj"), 2e4),
    "what is added to it": (("ff.net.2", "attn1.to_out"), 1e4),
    "GELU": (("ff.net.0",), 2e4),
    "q, k and v": (("attn1.to_q", "attn1.to_k", "attn1.to_v"), 2e4),
    "logits": (("norm_q.weight", "norm_k.weight"), 400.0),
    "the modulation": (("norm1.linear", "norm2.linear"), 2e4),
}
SLICED = Placement("sliced", "sliced")


def finite(x):
    return bool(torch.isfinite(x).all())


@torch.no_grad()
def stressed(model, parts, factor):
    for name, weight in model.named_parameters():
        if any(part in name for part in parts):
            weight.mul_(factor)
    return model.half()


def oracle_of(model, kind, as_sat, dtype):
    weights = {name: x.to(dtype) for name, x in model.state_dict().items()}
    heads, patch = model.config.num_attention_heads, model.config.patch
    return oracles.Transformer(as_sat("transformer", weights), heads, patch, (3, 4, 6), kind, last_eps=1e-5)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4)).half()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_transformer_stays_finite_and_exact(kind, published, as_sat):
    for what, (parts, factor) in STRESSES.items():
        model = stressed(ExpertTransformer.from_pretrained(published / kind), parts, factor)
        assert all(map(finite, model.parameters())), what
        config = model.config
        sizes = [n * p for n, p in zip((2, 4, 4), config.patch, strict=True)]
        given = drawn(1, config.in_channels, *sizes), drawn(1, 7, config.text_embed_dim)
        timestep = torch.tensor([500])
        plain, eager, exact = (
            oracle_of(model, kind, as_sat, dtype)(*(x.to(dtype) for x in given), timestep)
            for dtype in (torch.float16, torch.float32, torch.float64)
        )
        assert finite(exact) and not finite(plain), what
        ours = model(*given, timestep, placement=SLICED, careful=True)
        assert ours.dtype == torch.float32 and finite(ours), what
        # Sub-layers that fp16 holds are computed in it.
        bound = 2 * (eager - exact).abs().max() + 2 * torch.finfo(torch.float16).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= bound, (what, (ours - exact).abs().max() / bound)


@torch.no_grad()
def test_care_costs_other_dtypes_nothing(published):
    model = ExpertTransformer.from_pretrained(published / "5b")
    given = drawn(1, 16, 3, 8, 12).float(), drawn(1, 7, 20).float(), torch.tensor([500])
    assert torch.equal(model(*given), model(*given, careful=True))
    model.bfloat16()
    assert torch.equal(model(*given), model(*given, careful=True))


@torch.no_grad()
def test_logits_that_fp16_cannot_hold_are_known_from_the_weights(published):
    parts, factor = STRESSES["logits"]
    model = ExpertTransformer.from_pretrained(published / "5b").half()
    assert model.fits_fp16() and not stressed(model, parts, factor).fits_fp16()


@torch.no_grad()
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_the_vae_stays_finite_and_exact(half, published, as_sat):
    vae = stressed(CausalVAE.from_pretrained(published), [f"{half}.{part}" for part in ("mid_block", "conv_in")], 1e4)
    weights = {name: x.to(torch.float64) for name, x in vae.state_dict().items()}
    x = drawn(1, 3, 9, 8, 8) if half == "encoder" else drawn(1, vae.config.latent_channels, 3, 1, 1)

    def answer(dtype):
        oracle = oracles.VAE(as_sat("vae", {n: w.to(dtype) for n, w in weights.items()}), vae.config.norm_num_groups)
        if half == "encoder":
            return oracle.encode(x.to(dtype))[0]
        return oracle.decode(x.to(dtype), decode_chunks(3), four_each=False)

    plain, eager, exact = map(answer, (torch.float16, torch.float32, torch.float64))
    ours = vae.encode(x).mean if half == "encoder" else vae.decode(x)
    assert not finite(plain) and finite(ours)
    assert_as_accurate(ours, eager, exact)
