"""The cost model against numbers worked out by hand for 49 x 480 x 720: 17,776 tokens, of which 226 are text."""

import importlib
import math

import cost
import pytest
import torch
from cost import Cost, Peaks

from cogvx.config import PRESETS
from cogvx.models import CausalVAE, ExpertTransformer
from cogvx.models.transformer import Stream
from cogvx_kernels._op import OPS

TOKENS, TEXT = 17776, 226
LATENTS, VIDEO = (1, 16, 13, 60, 90), (1, 3, 49, 480, 720)
# One H100: its tensor cores and its exponential units (16 a clock on each of 132 multiprocessors) as built, 1.83 GHz.
H100 = Peaks(copy=3.0e12, products={torch.bfloat16: 989.4e12}, exps=16 * 132 * 1.83e9)
H200 = Peaks(copy=4.3e12, products={torch.bfloat16: 790e12}, exps=16 * 132 * 1.98e9)


def real(name: str, case: str, **others) -> tuple:
    """The arguments of one sample of a real case, without their values."""
    found = importlib.import_module(f"cogvx_kernels.{name}.cases").REAL[case]
    keywords = {**found.keywords, "dtype": torch.bfloat16, "device": "meta", **others}
    return found.func(1, *found.args[1:], **keywords)


@pytest.mark.parametrize(("kind", "teraflop", "gigabytes"), [("2b", 2.427, 0.273), ("5b", 3.883, 0.437)])
def test_attention(kind, teraflop, gigabytes):
    found = cost.of("joint_attention", real("joint_attention", f"{kind}, 49 x 480 x 720"))
    heads = PRESETS[kind].transformer.num_attention_heads
    assert found.flops == 4 * heads * TOKENS**2 * 64 == pytest.approx(teraflop * 1e12, abs=0.5e9)
    assert found.exps == heads * TOKENS**2
    assert found.bytes == pytest.approx(gigabytes * 1e9, abs=0.5e6)
    assert found.floor(H200, torch.bfloat16) == pytest.approx(teraflop / 790, rel=1e-3)
    # As many clocks for exponentials as for products, so that one after the other reaches half the peak.
    assert found.flops / found.serial(H100, torch.bfloat16) == pytest.approx(494e12, rel=2e-3)
    assert cost.of("joint_attention", real("joint_attention", f"{kind}, 49 x 480 x 720")[:3]) == found
    packed = cost.of("joint_attention", (*real("joint_attention", f"{kind}, 49 x 480 x 720")[:3], [TOKENS // 2] * 2))
    assert packed.flops == found.flops / 2


@pytest.mark.parametrize(("kind", "gigabytes", "milliseconds"), [("2b", 0.273, 0.064), ("5b", 0.437, 0.102)])
def test_a_norm_is_bytes_alone(kind, gigabytes, milliseconds):
    found = cost.of("gated_expert_layernorm", real("gated_expert_layernorm", f"{kind}, 49 x 480 x 720"))
    assert found.flops == found.exps == 0
    assert found.bytes == pytest.approx(gigabytes * 1e9, abs=0.6e6)
    assert found.floor(H200, torch.bfloat16) * 1e3 == pytest.approx(milliseconds, abs=5e-4)
    assert cost.bound(found, H200, torch.bfloat16) == "bytes"


@pytest.mark.parametrize(("kind", "block", "step"), [("2b", 4.00, 240), ("5b", 7.91, 664)])
def test_a_block_and_a_step_of_the_transformer(kind, block, step):
    config = PRESETS[kind].transformer
    with torch.device("meta"):
        model = ExpertTransformer(config).to(torch.bfloat16)
        x = torch.empty(1, TOKENS, config.width, dtype=torch.bfloat16)
        modulation = torch.empty(1, 2, 3, 2, config.width, dtype=torch.bfloat16)
        latents, text, timestep = torch.empty(2, *LATENTS[1:]), torch.empty(2, TEXT, 4096), torch.empty(2)
        rope = model.positions((13, 30, 45), TEXT, x.device)[1]
        stream = Stream(x, modulation[:, 0, 2], x.clone())
        of_block = cost.of_model(lambda: model.transformer_blocks[0](stream, modulation, rope, TEXT))
        of_step = cost.of_model(lambda: model(latents, text, timestep))
    assert of_block.flops == 24 * TOKENS * config.width**2 + 4 * TOKENS**2 * config.width
    assert of_block.flops == pytest.approx(block * 1e12, abs=5e9)
    assert of_step.flops == pytest.approx(step * 1e12, abs=0.5e12)


def test_the_vae():
    """As written 315 TFLOP for a decoded clip and 149 for an encoded one; 290 where equal terms are computed once."""
    diffusers = pytest.importorskip("diffusers")
    from torch.utils.flop_counter import FlopCounterMode

    config = PRESETS["2b"].vae
    with torch.device("meta"):
        ours = CausalVAE(config)
        theirs = diffusers.AutoencoderKLCogVideoX.from_config(config.to_dict())
        latents, video = torch.empty(LATENTS), torch.empty(VIDEO)
        of_decode, of_encode = cost.of_model(lambda: ours.decode(latents)), cost.of_model(lambda: ours.encode(video))
        written = []
        for call in (lambda: theirs.decode(latents), lambda: theirs.encode(video)):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                call()
            written.append(counter.get_total_flops() / 1e12)
    assert written == pytest.approx([315, 149], abs=0.5)
    assert of_decode.flops / 1e12 == pytest.approx(290, abs=1)
    assert 140 < of_encode.flops / 1e12 < written[1]


def test_a_convolution_behind_copies_of_its_first_frame_saves_three_products_of_a_frame():
    with torch.device("meta"):
        conv = [torch.empty(1, 8, 4, 5, 6), torch.empty(16, 8, 3, 3, 3), None, None]
        whole = cost.of("causal_conv3d", conv).flops
        with cost.Count() as count:
            for _ in range(2):
                torch.ops.cogvx.causal_conv3d(*conv)
    assert whole == 2 * 16 * 8 * 27 * 2 * 5 * 6
    assert count.total.flops == 2 * whole - whole // 2


def test_a_residual_is_read_once_and_its_gradient_costs_nothing():
    x, weight, residual = (torch.empty(shape) for shape in ((1, 8, 4, 5, 6), (16, 8, 3, 3, 3), (1, 16, 2, 5, 6)))
    for count in (cost.of, cost.with_gradients):
        more, less = (count("causal_conv3d", (x, weight, None, added)) for added in (residual, None))
        assert (more.flops, more.bytes - less.bytes) == (less.flops, residual.nbytes)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_costs_the_same_in_every_mode(mode):
    with mode():
        layer = torch.nn.Linear(8, 16, device="meta")
        assert cost.of_model(lambda: layer(torch.empty(2, 3, 8, device="meta"))).flops == 2 * 6 * 8 * 16


@pytest.mark.parametrize("name", OPS)
def test_every_operator_has_a_cost_at_every_real_size(name):
    module = importlib.import_module(f"cogvx_kernels.{name}.cases")
    for case in module.REAL:
        args = real(name, case)
        found = cost.of(name, args)
        assert 0 < found.floor(H200 if found.int8_flops == 0 else _with_int8(H200), torch.bfloat16) < 10
        if OPS[name].differentiable:
            both = cost.with_gradients(name, args)
            assert both.bytes >= 2 * found.bytes and both.flops >= 3 * found.flops


def _with_int8(peaks: Peaks) -> Peaks:
    return Peaks(peaks.copy, {**peaks.products, torch.int8: 2 * peaks.products[torch.bfloat16]}, peaks.exps)


def test_costs_add_up():
    one = Cost(flops=4, exps=2, bytes=6)
    assert one + one == one * 2 == Cost(flops=8, exps=4, bytes=12)
    peaks = Peaks(copy=1.0, products={torch.float32: 1.0})
    assert peaks.exps == math.inf
    assert one.floor(peaks, torch.float32) == 6 and one.serial(peaks, torch.float32) == 6
