"""GroupNorm and SiLU behind a halo, in plain PyTorch: the meaning of `group_norm_silu`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,  # [B, C, T, H, W]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    halo: Tensor | None,  # [B, C, num_halo, H, W]
    num_groups: int,
    eps: float,
    num_halo: int,
    moments: Tensor | None,  # [B, 2, C]
) -> Tensor:  # [B, C, num_halo + T, H, W]
    y = F.silu(group_norm(x, weight, bias, num_groups, eps))
    return join_halo(y, halo, num_halo)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    """GroupNorm of low-precision x with weights of its dtype or of float32; the result has the dtype of x."""
    # Contiguous, because the sums of a channels-last GroupNorm depend on the number of threads.
    y = x.contiguous()
    if weight.dtype != x.dtype and x.device.type != "cpu":
        y = y.to(weight.dtype)  # mixed dtypes are known to torch's CPU kernel alone
    return F.group_norm(y, num_groups, weight, bias, eps).to(x.dtype)


def join_halo(y: Tensor, halo: Tensor | None, num_halo: int) -> Tensor:
    """[halo, y] along time; without a halo, copies of the first frame take its place."""
    if num_halo == 0:
        return y
    if halo is None:
        halo = y[:, :, :1].expand(-1, -1, num_halo, -1, -1)
    return torch.cat([halo.to(y.dtype), y], dim=2)
