"""Weights in 8 bits: how near they come, and that a model with them computes what it would with the rounded ones."""

import pytest
import torch
from safetensors.torch import save_file

from cogvx.models import ExpertTransformer
from cogvx.models.eight_bits import (
    FORMS,
    EightBitLinear,
    in_eight_bits,
    multiply_in_fp8,
    to_eight_bits,
    widened_weight,
)
from cogvx.models.linear import WideLinear
from cogvx.models.lora import fuse_lora, load_lora, unload_lora
from cogvx.models.text import TextEncoder
from cogvx_kernels import rows_in_fp8

LAYERS = {f"transformer_blocks.{i}.{part}" for i in range(2) for part in (
    "norm1.linear", "norm2.linear", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj",
    "ff.net.2")}  # fmt: skip


@pytest.fixture
def transformer(published):
    return ExpertTransformer.from_pretrained(published / "5b")


def velocity(model):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, model.config.in_channels, 3, 8, 12, generator=generator)
    with torch.no_grad():
        return model(latents, torch.randn(1, 7, 20, generator=generator), torch.tensor([500]))


def rounded(model, form):
    """The same model with each weight rounded to what 8 bits hold of it, in its own dtype."""
    for name in LAYERS:
        layer = model.get_submodule(name)
        layer.weight.data = widened_weight(EightBitLinear(layer, form), layer.weight.dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_is_the_nearest_that_there_is(dtype):
    weight = torch.randn(33, 65, generator=torch.Generator().manual_seed(0)).mul(torch.logspace(-3, 2, 33)[:, None])
    weight[5] = 0
    weight = weight.to(dtype)
    for form in FORMS:
        numbers, scale = in_eight_bits(weight, form)
        assert numbers.dtype == torch.int8 and scale.shape == (33, 1) and scale.dtype == dtype
        layer = EightBitLinear(torch.nn.Linear(65, 33, dtype=dtype), form)
        layer.weight.data, layer.scale = numbers, scale
        found, exact = widened_weight(layer, torch.float64), weight.double()
        # Half a step, or what clamping loses where the scale was rounded down; fp8 has three bits behind the first.
        step = scale.double() * (0.5 + 127 * torch.finfo(dtype).eps)
        bound = step if form == "int8" else torch.maximum(exact.abs() / 16, scale.double() * 2**-10) * 1.01
        assert bool(((found - exact).abs() <= bound).all()), form
        assert bool((found[5] == 0).all())


@pytest.mark.parametrize("form", FORMS)
def test_a_model_computes_with_the_rounded_weights(published, transformer, relative_error, form):
    exact = velocity(transformer)
    expected = velocity(rounded(ExpertTransformer.from_pretrained(published / "5b"), form))
    to_eight_bits(transformer, form)
    assert {name for name, m in transformer.named_modules() if isinstance(m, EightBitLinear)} == LAYERS
    found = velocity(transformer)
    assert torch.equal(found, expected)
    assert 1e-4 < relative_error(found, exact) < (0.02 if form == "int8" else 0.1)


def test_a_lora_beside_them_leaves_no_trace(published, transformer, tmp_path):
    generator = torch.Generator().manual_seed(1)
    matrices = {f"transformer.transformer_blocks.0.attn1.to_q.lora_{letter}.weight":
                torch.randn(shape, generator=generator) / 4
                for letter, shape in (("A", (4, 96)), ("B", (96, 4)))}  # fmt: skip
    save_file(matrices, tmp_path / "style.safetensors")
    other = rounded(ExpertTransformer.from_pretrained(published / "5b"), "int8")
    to_eight_bits(transformer, "int8")
    plain = velocity(transformer)
    for model in (transformer, other):
        load_lora(model, tmp_path / "style.safetensors", 0.5)
    assert torch.equal(velocity(transformer), velocity(other)) and not torch.equal(velocity(transformer), plain)
    with pytest.raises(ValueError, match="the weights of this transformer are in int8, to which the sum would be"):
        fuse_lora(transformer)
    unload_lora(transformer)
    assert torch.equal(velocity(transformer), plain)
    assert type(transformer.transformer_blocks[0].attn1.to_q) is EightBitLinear


def test_products_in_fp8_of_weights_as_they_are_and_as_they_are_stored(published, transformer, relative_error):
    """Both round tokens and weights once; a hand-written layer does so too."""
    exact = velocity(transformer)
    other = ExpertTransformer.from_pretrained(published / "5b")
    modulating = {name for name in LAYERS if name.startswith("norm", name.index(".", 19) + 1)}
    for name in LAYERS - modulating:
        other.get_submodule(name).register_forward_pre_hook(
            lambda layer, args: (torch.stack([n.float() * scale for n, scale in map(rows_in_fp8, args[0])]), *args[1:])
        )
    for name in LAYERS - modulating:
        layer = other.get_submodule(name)
        numbers, scale = rows_in_fp8(layer.weight.data)
        layer.weight.data = numbers.float() * scale
    multiply_in_fp8(transformer)
    found = velocity(transformer)
    assert relative_error(found, velocity(other)) < 1e-5 and 1e-3 < relative_error(found, exact) < 0.15
    assert {name for name, m in transformer.named_modules() if getattr(m, "products", None)} == LAYERS - modulating
    for name in LAYERS - modulating:
        layer = transformer.get_submodule(name)
        stored = EightBitLinear(layer, "fp8")
        stored.products = "fp8"
        x = torch.randn(2, 70, layer.in_features)
        with torch.no_grad():
            assert torch.equal(stored(x), layer(x)), name


@torch.no_grad()
def test_a_lora_beside_products_in_fp8_is_exact(published, transformer, tmp_path):
    matrices = {f"transformer.transformer_blocks.0.attn1.to_q.lora_{letter}.weight": torch.randn(shape) / 4
                for letter, shape in (("A", (4, 96)), ("B", (96, 4)))}  # fmt: skip
    save_file(matrices, tmp_path / "style.safetensors")
    multiply_in_fp8(transformer)
    x, plain = torch.randn(1, 5, 96), velocity(transformer)
    before = transformer.transformer_blocks[0].attn1.to_q(x)
    load_lora(transformer, tmp_path / "style.safetensors")
    down, up = matrices.values()
    torch.testing.assert_close(transformer.transformer_blocks[0].attn1.to_q(x) - before, x @ down.t() @ up.t(),
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    fuse_lora(transformer)
    assert not torch.equal(velocity(transformer), plain)
    unload_lora(transformer)
    assert torch.equal(velocity(transformer), plain)


def test_products_in_fp8_round_nothing_twice(transformer):
    to_eight_bits(transformer, "int8")
    with pytest.raises(ValueError, match="has its weight in int8, which would be rounded twice"):
        multiply_in_fp8(transformer)


def test_a_model_in_fp16_widens_them_where_it_must(transformer):
    to_eight_bits(transformer.half(), "int8")
    latents, text = torch.randn(1, 16, 3, 8, 12), torch.randn(1, 7, 20)
    with torch.no_grad():
        careful = transformer(latents, text, torch.tensor([500]), careful=True)
    assert careful.dtype == torch.float32 and careful.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_the_text_encoder_in_eight_bits(published, relative_error, form):
    encoder = TextEncoder.from_pretrained(published)
    exact = encoder.encode(["a red circle"])
    to_eight_bits(encoder.model, form)
    found = encoder.encode(["a red circle"])
    assert 1e-4 < relative_error(found, exact) < (0.03 if form == "int8" else 0.15)
    with pytest.raises(ValueError, match="which no checkpoint holds; load them as stored to save"):
        encoder.save_pretrained(published / "never")


def test_what_cannot_be(transformer, tmp_path):
    with pytest.raises(ValueError, match="weights is 'int4'; valid: 'int8', 'fp8'"):
        to_eight_bits(transformer, "int4")
    to_eight_bits(transformer, "fp8")
    with pytest.raises(ValueError, match="weights are in fp8, which no checkpoint holds"):
        transformer.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_wide_layer_in_fp16_is_one_in_fp32():
    """Half the memory, every bit the same; a product of more than 65504 is none too large."""
    layer = WideLinear(40, 30, bias=False).half()
    x = 3000 * torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0)).half()
    layer.weight.data += 2
    assert torch.equal(layer(x), torch.nn.functional.linear(x.float(), layer.weight.float()))
    assert layer(x).abs().max() > 65504
