"""The gradients of the spatial norm's two 1x1x1 convolutions, which run at the latent's size."""

import torch
from torch import Tensor


def gradients(
    z: Tensor,  # [B, C_z, T_z, H_z, W_z]
    weight_y: Tensor,  # [C, C_z]
    weight_b: Tensor,  # [C, C_z]
    grad_scale: Tensor,  # [B, C, T_z, H_z, W_z], in float32 or float64
    grad_shift: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # of z, weight_y, bias_y, weight_b, bias_b
    """What follows from the gradients of scale = weight_y z + bias_y and of shift = weight_b z + bias_b."""
    c, c_z = weight_y.shape
    by_pixel = _rows(torch.cat([grad_scale, grad_shift], dim=1))  # [pixels, 2 C]
    weights = torch.cat([weight_y, weight_b]).to(by_pixel.dtype)
    latent = _rows(z).to(by_pixel.dtype)
    # A column of ones: the gradients of the biases come out of the same product.
    of_weights = by_pixel.mT @ torch.cat([latent, torch.ones_like(latent[:, :1])], dim=1)
    grad_z = (by_pixel @ weights).unflatten(0, (len(z), *z.shape[2:])).movedim(-1, 1)
    of_weights = of_weights.to(z.dtype)
    grads = (of_weights[:c, :c_z], of_weights[:c, c_z], of_weights[c:, :c_z], of_weights[c:, c_z])
    return grad_z.to(z.dtype), *(grad.clone() for grad in grads)


def _rows(x: Tensor) -> Tensor:  # [B, C, T, H, W] to [pixels, C]
    return x.movedim(1, -1).flatten(0, -2)
