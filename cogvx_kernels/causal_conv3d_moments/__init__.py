import torch
from torch import Tensor

from .._op import Op
from ..causal_conv3d import _op as _plain
from ..causal_conv3d import causal_conv3d, check
from . import reference


def causal_conv3d_moments(
    x: Tensor,  # [B, C, K_t - 1 + T, H, W]: the halo, then the chunk
    weight: Tensor,  # [C_out, C, K_t, K_h, K_w], odd K_h and K_w
    bias: Tensor | None,  # [C_out]
    residual: Tensor | None = None,  # [B, C_out, T, H, W]
) -> tuple[Tensor, Tensor]:  # [B, C_out, T, H, W] and [B, 2, C_out] float32
    """`causal_conv3d`, and mean and variance of each channel of its result, for the norm that follows; for inference.

    `group_norm_silu` and `spatial_norm_silu` take them as `moments`, and need not read the result to know them.

    Raises ValueError as `causal_conv3d` does; RuntimeError where a gradient is asked.
    """
    return _op(x, weight, bias, residual)


def causal_conv3d_for_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`causal_conv3d`, and for the norm that follows the moments of its result where they cost next to nothing.

    None in their place where a gradient is recorded, in a traced graph, or where no kernel measures what it writes: the
    norm then computes its own.
    """
    args = x, weight, bias, residual
    recorded = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)
    plain = torch.compiler.is_compiling() or recorded or (backend := _op.chosen(*args)) == "reference"
    if plain or backend != _plain.chosen(*args):  # the convolution is forced to another one, perhaps
        return causal_conv3d(*args), None
    return causal_conv3d_moments(*args)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    check("causal_conv3d_moments", x, weight, bias, residual)


_op = Op("causal_conv3d_moments", reference, "cuda", check=_check, differentiable=False)
