"""A block of the 2B transformer beside diffusers', with the same weights, in turns in one process.

The two see the work of a step in the middle of the model: ours takes the last sub-layer's output unsummed, leaves its
own so, and has its modulation from a table; diffusers' takes the sum.
"""

from time import perf_counter

import pytest
import torch
from conftest import DEVICE, DEVICE_NAME, synchronize
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

from cogvx.config import PRESETS
from cogvx.models.transformer import ExpertBlock, Stream
from cogvx_kernels.testing import Normal

CONFIG = PRESETS["2b"].transformer
NUM_TEXT = CONFIG.max_text_seq_length
CLOSE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # of the norm of the result; attention rounds its weights in bf16


@pytest.mark.parametrize(
    ("dtype", "tokens", "rounds"),
    [(torch.bfloat16, 4096, 5), (torch.bfloat16, 17776, 2), (torch.float32, 4096, 5)],
    ids=["bf16, 4096 tokens", "bf16, 17776 tokens", "fp32, 4096 tokens"],
)
@torch.inference_mode()
def test_block(benchmark, dtype, tokens, rounds):
    ours, theirs = blocks(dtype)
    normal = Normal(dtype, DEVICE, seed=1)
    x, y, gate = normal(1, tokens, CONFIG.width), normal(1, tokens, CONFIG.width), normal(1, 2, CONFIG.width)
    condition = normal(1, CONFIG.time_embed_dim)
    norms = torch.stack([norm.modulate(torch.nn.functional.silu(condition)) for norm in (ours.norm1, ours.norm2)], 1)
    text, vision = sum_of(Stream(x, gate, y))
    seconds = []

    def run_theirs():
        before = perf_counter()
        result = theirs(vision, text, condition)
        synchronize()
        seconds.append(perf_counter() - before)
        return result

    def run_ours():
        stream = ours(Stream(x, gate, y), norms, None, NUM_TEXT)
        synchronize()
        return stream

    benchmark.group = f"2B block, {dtype}, {tokens} tokens ({DEVICE_NAME})"
    benchmark.extra_info |= {"torch": torch.__version__, "device": DEVICE_NAME}
    # What is set up before a round is not in its time, so the two run in turns.
    stream = benchmark.pedantic(run_ours, setup=lambda: run_theirs() and None, rounds=rounds, warmup_rounds=1)
    for one, other in zip(sum_of(stream), reversed(run_theirs()), strict=True):
        error = ((one.float() - other.float()).norm() / other.float().norm()).item()
        assert error <= CLOSE[dtype], error
    best = benchmark.stats.stats.min
    benchmark.extra_info |= {
        "TFLOP/s": round(flops(tokens) / best / 1e12, 3),
        "diffusers, seconds": round(min(seconds), 4),
        "times diffusers": round(min(seconds) / best, 2),
    }


def blocks(dtype: torch.dtype) -> tuple[ExpertBlock, CogVideoXBlock]:
    """Ours and theirs, with the same random weights."""
    torch.manual_seed(0)
    theirs = CogVideoXBlock(
        CONFIG.width, CONFIG.num_attention_heads, CONFIG.attention_head_dim, CONFIG.time_embed_dim,
        attention_bias=True, norm_eps=CONFIG.norm_eps,
    )  # fmt: skip
    ours = ExpertBlock(CONFIG)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(DEVICE, dtype).eval(), theirs.to(DEVICE, dtype).eval()


def sum_of(stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and vision of the residual stream."""
    x, gate, y = stream
    return x[:, :NUM_TEXT] + gate[:, :1] * y[:, :NUM_TEXT], stream.vision(NUM_TEXT)


def flops(tokens: int) -> int:
    return tokens * 2 * 12 * CONFIG.width**2 + 4 * tokens**2 * CONFIG.width
