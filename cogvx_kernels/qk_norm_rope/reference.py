"""Per-head norms of q and k and the rotation of vision, in plain PyTorch: the meaning of `qk_norm_rope`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    qkv: Tensor,  # [B, N, 3 A E], text first
    q_weight: Tensor,  # [E]
    q_bias: Tensor,  # [E]
    k_weight: Tensor,  # [E]
    k_bias: Tensor,  # [E]
    cos: Tensor | None,  # [N - num_text, E]
    sin: Tensor | None,  # [N - num_text, E]
    num_text: int,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, A, N, E] each
    head_width = qkv.shape[2] // (3 * num_heads)
    q, k, v = qkv.unflatten(2, (3, num_heads, head_width)).permute(2, 0, 3, 1, 4)
    q = F.layer_norm(q, (head_width,), q_weight, q_bias, eps)
    k = F.layer_norm(k, (head_width,), k_weight, k_bias, eps)
    if cos is not None and sin is not None:
        q, k = (_rotate_vision(x, cos, sin, num_text) for x in (q, k))
    # v is cloned, because with one head it would be a view of qkv.
    return q.to(v.dtype).contiguous(), k.to(v.dtype).contiguous(), v.clone(memory_format=torch.contiguous_format)


def _rotate_vision(x: Tensor, cos: Tensor, sin: Tensor, num_text: int) -> Tensor:
    text, vision = x[:, :, :num_text], x[:, :, num_text:]
    even, odd = vision.unflatten(3, (x.shape[3] // 2, 2)).unbind(4)
    turned = torch.stack([-odd, even], dim=4).flatten(3)
    # Where cos and sin are float32, the products are too, whatever x is.
    return torch.cat([text, (vision * cos + turned * sin).to(x.dtype)], dim=2)
