"""A value that is not finite stops the work, and the message says in which step and module it came up."""

import pytest
import torch

from cogvx import Pipeline
from cogvx.finite import NonFiniteError, check_finite
from cogvx.models import CausalVAE

QUICK = {"num_inference_steps": 3, "num_frames": 9, "seed": 0, "progress": False}


@pytest.fixture
def pipeline(small_checkpoint):
    return Pipeline.from_pretrained(small_checkpoint("5b"), numerics="diffusers")  # fresh: each test spoils it


@torch.no_grad()
def plant(model, name, value=torch.nan):
    model.get_parameter(name).view(-1)[0] = value


@pytest.mark.parametrize(("weight", "module"), [
    ("patch_embed.proj.weight", "ExpertTransformer.patch_embed.proj"),
    ("patch_embed.text_proj.bias", "ExpertTransformer.patch_embed.text_proj"),
    ("transformer_blocks.1.norm1.norm.weight", "ExpertTransformer.transformer_blocks.1.norm1"),
    ("transformer_blocks.1.attn1.norm_q.weight", "ExpertTransformer.transformer_blocks.1.attn1"),
    ("transformer_blocks.0.ff.net.2.weight", "ExpertTransformer.transformer_blocks.0.ff.net.2"),
    ("proj_out.bias", "ExpertTransformer.proj_out"),
])  # fmt: skip
def test_a_nan_in_the_transformer_is_named_in_the_first_step(weight, module, pipeline):
    plant(pipeline.transformer, weight)
    with pytest.raises(NonFiniteError) as caught:
        pipeline("a red circle", **QUICK)
    assert f"came out of {module} in step 1 of 3 (torch.float32)" in str(caught.value)
    assert f"{weight} is not finite" in str(caught.value) and "cogvx verify" in str(caught.value)


@pytest.mark.parametrize(("weight", "module"), [
    ("decoder.conv_in.conv.weight", "CausalVAE.decoder.conv_in"),
    ("decoder.up_blocks.1.resnets.0.norm1.conv_y.conv.bias", "CausalVAE.decoder.up_blocks.1.resnets.0.norm1"),
    ("decoder.up_blocks.0.upsamplers.0.conv.bias", "CausalVAE.decoder.up_blocks.0.upsamplers.0"),
    ("decoder.conv_out.conv.bias", "CausalVAE.decoder.conv_out"),
])  # fmt: skip
def test_a_nan_in_the_vae_is_named_in_decoding(weight, module, pipeline):
    plant(pipeline.vae, weight)
    with pytest.raises(NonFiniteError) as caught:
        pipeline("a red circle", **QUICK)
    assert f"came out of {module} in decoding" in str(caught.value) and weight in str(caught.value)


def test_a_nan_in_the_text_encoder_is_named(pipeline):
    plant(pipeline.text_encoder.model, "encoder.final_layer_norm.weight", torch.inf)
    with pytest.raises(NonFiniteError, match=r"T5EncoderModel\.encoder\.final_layer_norm in encoding the prompt"):
        pipeline("a red circle", **QUICK)


def test_a_later_step_is_named_with_what_to_try(pipeline):
    def overflow(pipe, index, timestep, tensors):
        return {"latents": tensors["latents"] * 1e37} if index == 1 else None

    with pytest.raises(NonFiniteError) as caught:
        pipeline("a red circle", **QUICK, callback_on_step_end=overflow)
    assert "in step 3 of 3" in str(caught.value) and "the weights are finite: try dtype=" in str(caught.value)


def test_finite_values_pass_without_a_second_run():
    vae = CausalVAE.__new__(CausalVAE)  # never asked for anything

    def run():
        raise AssertionError("ran again")

    check_finite(torch.tensor([1e38, -0.0]), "decoding", vae, run)


def test_watching_leaves_no_hooks_behind(pipeline):
    plant(pipeline.transformer, "proj_out.bias")
    with pytest.raises(NonFiniteError):
        pipeline("a red circle", **QUICK)
    assert not any(module._forward_hooks for module in pipeline.transformer.modules())


@torch.no_grad()
def test_fp16_that_overflows_is_computed_with_care_from_then_on(pipeline, monkeypatch):
    transformer, settings = pipeline.transformer, {"num_inference_steps": 3, "num_frames": 9, "seed": 3}
    for block in transformer.transformer_blocks:
        block.ff.net[0]["proj"].weight.mul_(3e4)
    transformer.half()
    careful = []
    plain = type(transformer).forward

    def watched(*args, **how):
        careful.append(how["careful"])
        return plain(*args, **how)

    monkeypatch.setattr(type(transformer), "forward", watched)
    made = pipeline("a red circle", progress=False, **settings).frames.astype(int)
    assert careful == [False, True, True, True]
    monkeypatch.setattr(type(transformer), "forward", plain)
    transformer.float()
    exact = pipeline("a red circle", progress=False, **settings).frames.astype(int)
    assert abs(made - exact).mean() < 2.0
