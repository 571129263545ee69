"""Forward and backward pass of a block of the 2B transformer beside diffusers', with the same weights and gradients.

Ours takes and leaves the last sub-layer's output unsummed, as between two blocks; diffusers' takes the sum. Both make
their modulation from the timestep's condition, and all weights and inputs have gradients. COGVX_BENCH_BLOCK_TOKENS
changes the number of tokens.
"""

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from bench_models import CONFIG, NUM_TEXT, blocks, sum_of
from conftest import DEVICE
from torch import Tensor

from cogvx.machine import peak_of_tensors
from cogvx.models.transformer import Stream
from cogvx_kernels.testing import Normal

pytestmark = pytest.mark.products

TOKENS = int(os.environ.get("COGVX_BENCH_BLOCK_TOKENS", "4096"))
CLOSE = {
    torch.bfloat16: 5e-2,
    torch.float32: 1e-4,
}  # of the norm of all gradients; in bf16 they are sums of rounded ones


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_block_with_its_gradients(measure, row, dtype):
    ours, theirs = blocks(dtype)
    normal = Normal(dtype, DEVICE, seed=1)
    stream = Stream(
        normal(1, TOKENS, CONFIG.width), normal(1, 2, CONFIG.width, std=0.5), normal(1, TOKENS, CONFIG.width)
    )
    text, vision = (x.contiguous() for x in sum_of(stream))
    condition, grad = normal(1, CONFIG.time_embed_dim), normal(1, TOKENS, CONFIG.width)
    mine = partial(gradients, ours, our_block, (*stream, condition), grad)
    other = partial(gradients, theirs, their_block, (vision, text, condition), grad)
    group = f"2B block with gradients, {TOKENS} tokens, {dtype}"
    measure(group, "ours against diffusers", mine, reference=other)
    found, our_peak = with_peak(mine)
    wanted, their_peak = with_peak(other)
    error = sum((one - x).double().square().sum() for one, x in zip(found, wanted, strict=True)).sqrt()
    assert error <= CLOSE[dtype] * sum(x.double().square().sum() for x in wanted).sqrt()
    for name, peak in (("ours", our_peak), ("diffusers'", their_peak)):
        row(f"{group}, most memory of tensors beyond weights and inputs", name, MiB=f"{peak / 2**20:.0f}")
    assert our_peak <= their_peak


def gradients(block: torch.nn.Module, run: Callable, inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """Those of all weights, in the order of their names; those of the inputs are computed too."""
    run(block, *(x.detach().requires_grad_() for x in inputs)).backward(grad)
    found = [weight.grad for _, weight in sorted(block.named_parameters())]
    block.zero_grad()  # so that the next call starts with the memory that this one did
    return found


def with_peak(call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], int]:
    """The result of a call, and the most bytes that its tensors held at once."""
    found: list[Tensor] = []
    return found, peak_of_tensors(lambda: found.extend(call()), torch.device(DEVICE))


def our_block(block: torch.nn.Module, x: Tensor, gate: Tensor, y: Tensor, condition: Tensor) -> Tensor:
    silu = torch.nn.functional.silu(condition)
    norms = torch.stack([block.norm1.modulate(silu), block.norm2.modulate(silu)], 1)
    return torch.cat(sum_of(block(Stream(x, gate, y), norms, None, NUM_TEXT)), dim=1)


def their_block(block: torch.nn.Module, vision: Tensor, text: Tensor, condition: Tensor) -> Tensor:
    vision, text = block(vision, text, condition)
    return torch.cat([text, vision], dim=1)
