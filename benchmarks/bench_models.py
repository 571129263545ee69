"""A block of the 2B transformer beside diffusers', with the same weights, in turns in one process.

The two see the work of a step in the middle of the model: ours takes the last sub-layer's output unsummed, leaves its
own so, and has its modulation from a table; diffusers' takes the sum.
"""

import cost
import pytest
import torch
from conftest import DEVICE
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

from cogvx.config import PRESETS
from cogvx.models.transformer import ExpertBlock, Stream
from cogvx_kernels.testing import Normal

pytestmark = pytest.mark.products

CONFIG = PRESETS["2b"].transformer
NUM_TEXT = CONFIG.max_text_seq_length
CLOSE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # of the norm of the result; attention rounds its weights in bf16


@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [(torch.bfloat16, 4096), (torch.bfloat16, 17776), (torch.float32, 4096)],
    ids=["bf16, 4096 tokens", "bf16, 17776 tokens", "fp32, 4096 tokens"],
)
@torch.inference_mode()
def test_block(measure, dtype, tokens):
    ours, theirs = blocks(dtype)
    normal = Normal(dtype, DEVICE, seed=1)
    stream = Stream(
        normal(1, tokens, CONFIG.width), normal(1, 2, CONFIG.width, std=0.5), normal(1, tokens, CONFIG.width)
    )
    condition = normal(1, CONFIG.time_embed_dim)
    silu = torch.nn.functional.silu(condition)
    norms = torch.stack([ours.norm1.modulate(silu), ours.norm2.modulate(silu)], 1)
    text, vision = sum_of(stream)
    result = measure(
        f"2B block, {tokens} tokens, {dtype}",
        "ours against diffusers",
        lambda: ours(stream, norms, None, NUM_TEXT),
        cost.of_model(lambda: ours(stream, norms, None, NUM_TEXT)),
        reference=lambda: theirs(vision, text, condition),
    )
    for one, other in zip(sum_of(result), reversed(theirs(vision, text, condition)), strict=True):
        error = ((one.float() - other.float()).norm() / other.float().norm()).item()
        assert error <= CLOSE[dtype], error


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
