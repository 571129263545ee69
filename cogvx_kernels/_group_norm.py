"""What the GPU backends of `group_norm_silu` and `spatial_norm_silu` share: CUDA stages, and how gradients end."""

import torch
from torch import Tensor

from . import _extension
from ._extension import cuda_place

FOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The tensors of a stage, in the order of csrc/group_norm_silu/stage.h.
_TENSORS = (
    "x", "y", "weight", "bias", "moments", "statistics", "latent", "grad", "grad_x", "partials", "ends", "grad_latent",
    "channel_moments",
)  # fmt: skip


class Stages:
    """The CUDA kernels of one call on a channels-last chunk: `stages("group_norm_silu_apply", x=x, y=y, ...)`."""

    def __init__(self, x: Tensor, num_groups: int, eps: float, num_halo: int, num_copies: int, latent: Tensor | None,
                 in_double: bool = False):  # fmt: skip
        self.x, self.eps, self.groups = x, eps, (num_halo, num_copies, num_groups)
        b, c, t, h, w = x.shape
        self.flat = b, c, t, 1, h * w, *self.groups, 0, 0, 0, in_double
        self.sizes = self.flat if latent is None else (b, c, t, h, w, *self.groups, *latent.shape[1:4], in_double)

    def __call__(self, stage: str, sizes: tuple[int, ...] | None = None, **tensors: Tensor | None) -> None:
        tensors["x"] = self.x
        given = (tensors.get(name) for name in _TENSORS)
        addresses = [0 if t is None else t.data_ptr() for t in given]
        run = getattr(_extension.cuda(), stage)
        run(cuda_place(self.x), _extension.DTYPES[self.x.dtype], self.eps, sizes or self.sizes, addresses)

    def partials(self, pieces: int) -> Tensor:  # [B, pieces, 2, C]
        return self.x.new_empty(len(self.x), pieces, 2, self.x.shape[1], dtype=torch.float64)

    def statistics(self, moments: Tensor | None) -> Tensor:  # [B, 2, C] -> [B, 2, C]
        """Mean and 1 / sqrt(variance + eps) of every channel's group, from the moments of x where they are known."""
        result = self.x.new_empty(len(self.x), 2, self.x.shape[1], dtype=torch.float64)
        if moments is not None:
            moments = moments.float().contiguous()
            self("group_norm_statistics", self.flat, channel_moments=moments, statistics=result)
        else:
            of_pieces = self.partials(_extension.cuda().group_norm_pieces(self.flat))
            self("group_norm_statistics", self.flat, moments=of_pieces, statistics=result)
        return result

    def scratch(self, moments: Tensor | None) -> list[Tensor]:
        """What `statistics` makes, not filled."""
        of_pieces = [] if moments is not None else [self.partials(_extension.cuda().group_norm_pieces(self.flat))]
        return [self.x.new_empty(len(self.x), 2, self.x.shape[1], dtype=torch.float64), *of_pieces]


def gradient_of_moments(moments: Tensor | None) -> Tensor | None:
    """Nothing: they only say what x says already."""
    return None if moments is None else torch.zeros_like(moments)


def channels_last(x: Tensor) -> Tensor:  # [B, C, T, H, W]
    """`x`, or a copy of it in which a pixel's channels lie side by side."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def finish_gradients(
    sums: Tensor,  # [B, 2, C] in float64, of d and of d * (x - mean), with d the gradient of GroupNorm's result
    stats: Tensor,  # [B, 2, C]
    weight: Tensor,  # [C]
    num_groups: int,
    num_pixels: int,
) -> tuple[Tensor, Tensor, Tensor]:  # of weight and bias; [B, 2, C]
    """Gradients of weight and bias; constant and slope of dL/dx = d rstd weight + constant + slope (x - mean)."""
    _, _, c = sums.shape
    rstd = stats[:, 1].double()
    grad_weight, grad_bias = (sums[:, 1] * rstd).sum(0), sums[:, 0].sum(0)
    means = (sums * weight.double()).unflatten(2, (num_groups, -1)).sum(3) / (c // num_groups * num_pixels)
    constant, slope = means.repeat_interleave(c // num_groups, dim=2).unbind(1)
    ends = torch.stack([-rstd * constant, -(rstd**3) * slope], dim=1).to(stats.dtype)
    return grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), ends
