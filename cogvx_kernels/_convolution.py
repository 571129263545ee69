"""Tensors as the CUDA convolutions take them: whole vectors of channels, weights in the order in which they stream."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension

_VECTOR = 8  # channels of 16 bytes
# The gradient of a weight is summed in splits: enough blocks for any GPU, the same on all, so that sums are too.
_BLOCKS, _LEAST_PATCHES = 1024, 16


def in_vectors(x: Tensor) -> Tensor:  # [B, C, T, H, W] -> the same in channels-last memory, C filled up to a vector
    """`x` itself where it is so already: aligned to 16 bytes and of whole vectors of channels."""
    c = x.shape[1]
    if c % _VECTOR == 0:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return x if x.data_ptr() % 16 == 0 else x.clone()
    shape = (x.shape[0], -(-c // _VECTOR) * _VECTOR, *x.shape[2:])
    filled = torch.zeros(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=torch.channels_last_3d)
    filled[:, :c] = x
    return filled


def block_of(num_out: int) -> int:
    """The output channels of a tile."""
    wide, narrow = _extension.cuda().CONVOLUTION_BLOCKS
    return narrow if num_out <= narrow else wide


def in_tiles(weight: Tensor) -> Tensor:
    """A weight [phases of y, C_out, K_t, phases of x, taps, C] in the order in which a tile of the result takes it.

    That is [phases of y, tiles, K_t, phases of x, depths, taps, block, depth], with zeros where a tile is not full.
    """
    c_out, c = weight.shape[1], weight.shape[5]
    block, depth = block_of(c_out), _extension.cuda().CONVOLUTION_DEPTH
    if c % depth or c_out % block:
        weight = F.pad(weight, (0, -c % depth, *[0] * 6, 0, -c_out % block))
    return weight.unflatten(5, (-1, depth)).unflatten(1, (-1, block)).permute(0, 1, 3, 4, 6, 5, 2, 7).contiguous()


def splits_of(left: Tensor, num_left: int, num_right: int, num_taps: int) -> tuple[int, int]:
    """Of the sum over the pixels of `left`: patches a split, and splits."""
    rows, columns = _extension.cuda().CONVOLUTION_WEIGHT_PATCH
    b, _, t, h, w = left.shape
    patches = b * t * -(-h // rows) * -(-w // columns)
    wide = _extension.cuda().CONVOLUTION_BLOCKS[0]
    blocks = num_taps * -(-num_left // wide) * -(-num_right // wide)
    a_split = max(_LEAST_PATCHES, -(-patches // max(1, _BLOCKS // blocks)))
    return a_split, -(-patches // a_split)
