"""The networks under the official code's numerics, against an oracle that knows nothing of ours."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvx.models import CausalVAE, ExpertTransformer
from cogvx.models.choices import decode_chunks, encode_chunks, first_alone, image_scaling, last_norm_eps, placement
from cogvx.models.image_latents import encode_image, in_frames, with_image
from cogvx.numerics import DIFFUSERS, SAT

SPEC = importlib.util.spec_from_file_location("sat_networks", Path(__file__).with_name("sat_oracle.py"))
oracles = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(oracles)

KINDS = ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
GRIDS = [(3, 4, 6), (2, 6, 4), (1, 2, 9), (3, 5, 3)]  # patches; trained are 3, 4, 6


def drawn(*shape, seed=4):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair(published, as_sat):
    """`pair(kind)`: our transformer with the official code's numerics, and the oracle with the same weights."""

    def make(kind, numerics=SAT):
        model = ExpertTransformer.from_pretrained(published / kind)
        config = model.config
        model.norm_out.norm.eps = last_norm_eps(config, numerics)
        weights = as_sat("transformer", model.state_dict())
        return model, oracles.Transformer(weights, config.num_attention_heads, config.patch, (3, 4, 6), kind)

    return make


def velocity(model, latents, text, timestep, numerics=SAT):
    return model(latents, text, timestep, placement=placement(model.config, numerics, latents.shape[2:]))


def inputs(config, grid):
    sizes = [n * p for n, p in zip(grid, config.patch, strict=True)]
    return drawn(2, config.in_channels, *sizes), drawn(2, 7, config.text_embed_dim), torch.tensor([999, 37])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_transformer_is_the_official_codes(kind, pair, relative_error):
    model, oracle = pair(kind)
    for grid in GRIDS:
        given = inputs(model.config, grid)
        assert relative_error(velocity(model, *given), oracle(*given)) <= 1e-5, grid


@torch.no_grad()
@pytest.mark.parametrize(("field", "kind"), [
    ("last_norm_eps", "2b"), ("rope_positions", "5b"), ("sincos_table", "2b"), ("sincos_table", "5b-i2v"),
])  # fmt: skip
def test_the_oracle_sees_every_choice_of_the_transformer(field, kind, pair, relative_error):
    other = replace(SAT, **{field: getattr(DIFFUSERS, field)})
    model, oracle = pair(kind, other)
    if field == "last_norm_eps":  # what is normalized last is small, so that an eps matters
        model.norm_final.weight.mul_(1e-3)
        model.norm_final.bias.mul_(1e-3)
    given = inputs(model.config, (2, 2, 3))
    assert relative_error(velocity(model, *given, other), oracle(*given)) > 1e-4


@torch.no_grad()
def test_q_and_k_turn_in_the_models_dtype(pair):
    model, oracle = pair("5b")
    model = model.bfloat16()
    oracle.w = {name: x.bfloat16() for name, x in oracle.w.items()}
    given = [x.bfloat16() if x.is_floating_point() else x for x in inputs(model.config, (3, 4, 6))]
    where = placement(model.config, SAT, (3, 8, 12))
    tables = model.positions((3, 4, 6), 7, torch.device("cpu"), where)[1]
    for ours, theirs in zip(tables, oracle.angles((3, 4, 6), 32), strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert (ours == theirs).double().mean() > 0.999  # but for the last bit of a cosine in fp32
    fine = velocity(model, *given, replace(SAT, rope_dtype="fp32"))
    assert not torch.equal(velocity(model, *given), fine)


@pytest.fixture(scope="module")
def vaes(published, as_sat):
    ours = CausalVAE.from_pretrained(published)
    return ours, oracles.VAE(as_sat("vae", ours.state_dict()), ours.config.norm_num_groups)


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 9, 17])
def test_a_clip_is_encoded_whole(num_frames, vaes, relative_error):
    ours, oracle = vaes
    video = drawn(1, 3, num_frames, 16, 8)
    posterior, (mean, logvar) = ours.encode(video, encode_chunks(num_frames, SAT)), oracle.encode(video)
    assert relative_error(posterior.mean, mean) <= 1e-5 and relative_error(posterior.raw_logvar, logvar) <= 1e-5
    if num_frames > 15:  # that others take in eights
        assert relative_error(ours.encode(video).mean, mean) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("num_latents", "num_frames"), [(13, 49), (21, 84), (41, 164)])
def test_latents_are_decoded_in_the_official_chunks(num_latents, num_frames, vaes, relative_error):
    ours, oracle = vaes
    z = drawn(1, ours.config.latent_channels, num_latents, 1, 1)
    made = ours.decode(z, decode_chunks(num_latents, SAT), first_alone(num_latents, SAT))
    expected = oracle.decode(z, oracles.decode_lengths(num_latents), four_each=num_latents > 13)
    assert made.shape[2] == num_frames and relative_error(made, expected) <= 1e-5


@torch.no_grad()
def test_an_odd_count_can_still_be_decoded_to_one_frame_more_than_fours(vaes, relative_error):
    ours, oracle = vaes
    z, numerics = drawn(1, ours.config.latent_channels, 15, 1, 1), replace(SAT, odd_latents="first_alone")
    made = ours.decode(z, decode_chunks(15, numerics), first_alone(15, numerics))
    assert relative_error(made, oracle.decode(z, [3] + [2] * 6, four_each=False)) <= 1e-5
    assert made.shape[2] == 57 and first_alone(13, SAT) and not first_alone(15, SAT)


def test_the_lengths_of_chunks():
    for count in (13, 21):  # the same in both
        assert decode_chunks(count, SAT) in (None, oracles.decode_lengths(count))
    assert decode_chunks(41, SAT) == oracles.decode_lengths(41) and decode_chunks(41, DIFFUSERS) is None
    assert decode_chunks(25, SAT) == [3] * 5 + [2] * 5


@torch.no_grad()
@pytest.mark.parametrize(("inverts", "factor"), [(False, 0.7), (True, 1.0)])
def test_an_image_is_encoded_alone_and_scaled_as_officially(inverts, factor, vaes, relative_error):
    ours, oracle = vaes
    config = replace(ours.config, scaling_factor=0.7, invert_scale_latents=inverts)
    scaled = CausalVAE(config).eval()
    scaled.load_state_dict(ours.state_dict())
    picture = drawn(1, 3, 16, 16)
    latent = encode_image(scaled, picture, image_scaling(config, SAT), [torch.Generator().manual_seed(8)])
    mean, logvar = oracle.encode(picture[:, :, None])
    sampled = factor * (mean + (0.5 * logvar.clamp(-30, 20)).exp() * drawn(*mean.shape, seed=8))
    noisy = drawn(2, 5, 3, 2, 2)
    made = with_image(noisy, in_frames({0: latent}, 3))
    expected = torch.cat([noisy, torch.cat([sampled, torch.zeros(1, 5, 2, 2, 2)], 2).expand(2, -1, -1, -1, -1)], 1)
    assert relative_error(made, expected) <= 1e-5
