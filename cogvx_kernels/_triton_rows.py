"""Rows of text and vision in Triton: how programs share them out, and how one is normalized."""

import torch
import triton
import triton.language as tl

# Rows up to this width are worked on in float64: of so few values, what is left after the mean and the slope are taken
# out can be as small as the rounding of float32.
NARROW = tl.constexpr(8)


@triton.jit
def chunk_of_program(num_rows, num_text, ROWS: tl.constexpr):
    """The chunk of program (index, b): first row, last row + 1 and 0 for text or 1 for vision; none mixes the two."""
    index = tl.program_id(0)
    num_text_chunks = tl.cdiv(num_text, ROWS)
    is_vision = (index >= num_text_chunks).to(tl.int32)
    first = index * ROWS + is_vision * (num_text - num_text_chunks * ROWS)
    end = tl.where(is_vision == 1, num_rows, num_text)
    return first, tl.minimum(first + ROWS, end), is_vision


@triton.jit
def load_row(row, inside, A: tl.constexpr):
    """A row in the arithmetic type, with zeros where it ends; by way of float32, as interpreted bfloat16 must go."""
    return tl.load(row, mask=inside, other=0.0).to(tl.float32).to(A)


@triton.jit
def store_row(row, values, inside):
    tl.store(row, values.to(tl.float32).to(row.dtype.element_ty), mask=inside)


@triton.jit
def normalize(x, inside, width, eps):
    """xhat = (x - mean) / sqrt(variance + eps) and the factor; two passes, so that a large mean costs no accuracy."""
    mean = tl.sum(x, 0) / width
    centered = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 0) / width + eps)
    return centered * rstd, rstd


def num_chunks(num_rows: int, size: int) -> int:
    return -(-num_rows // size)


def sums_dtype(width: int) -> torch.dtype:
    """The arithmetic type of a kernel, and so of the sums that it hands on."""
    return torch.float64 if width <= NARROW.value else torch.float32


def options(width: int, rows: int) -> dict:
    """The compile-time arguments of a kernel whose programs take `rows` rows, one after the other."""
    block = triton.next_power_of_2(width)
    return {
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": min(max(block // 512, 1), 16),
        # A product that is fused into one sum and not into another leaves a difference where there is none.
        "enable_fp_fusion": False,
    }
