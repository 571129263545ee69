"""The 3x3 taps after a nearest upsampling, merged: of the upsampled pixels under them many are equal.

Along one axis the three taps fall on two pixels of the input: on an even row taps 0 | 1 + 2, on an odd row 0 + 1 | 2.
As one list, M = (w0, w0 + w1, w1 + w2, w2), the taps of phase p = 0, 1 are M[p] and M[p + 2], on rows i + p - 1 and
i + p. Beyond the border the input's zeros are the upsampled ones, so zero padding stays what it was.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FOR_SHAPES = "x of at least 8 values"  # of a backend that multiplies with merged taps
_FEWEST = 8


def why_not_merged(x: Tensor) -> str | None:
    """Why x needs the taps as they are, or None.

    Merged taps are rounded once more. That error is small beside the largest of several results, but a single gradient
    may be much smaller than the terms that it sums up, and the error is as large as theirs.
    """
    return f"merged taps are for {FOR_SHAPES}, not of {x.numel()}" if 0 < x.numel() < _FEWEST else None


def merge_taps(weight: Tensor) -> Tensor:  # [C_out, C, 3, 3] -> [C_out, C, 4, 4]
    """M along both axes; sums in float32 at least, rounded once."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    rows = F.pad(wide, (0, 0, 1, 0)) + F.pad(wide, (0, 0, 0, 1))
    return (F.pad(rows, (1, 0)) + F.pad(rows, (0, 1))).to(weight.dtype)


def split_taps(grad: Tensor) -> Tensor:  # [C_out, C, 4, 4] -> [C_out, C, 3, 3]
    """The gradient of the 3x3 taps from that of the merged ones."""
    rows = grad[:, :, :3] + grad[:, :, 1:]
    return rows[..., :3] + rows[..., 1:]


def sum_pairs(grad: Tensor) -> Tensor:  # [B, C, T', H, W] -> [B, C, T, H, W]
    """The gradient of frames that came twice; in an odd number of frames the first came once."""
    alone = grad.shape[2] % 2
    pairs = grad[:, :, alone::2] + grad[:, :, alone + 1 :: 2]
    return torch.cat([grad[:, :, :1], pairs], dim=2) if alone else pairs
