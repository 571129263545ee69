"""The operators of CogVideoX: each a plain PyTorch function with faster backends, usable without the rest of cogvx.

>>> from cogvx_kernels import expert_layernorm, use_backend, explain
"""

from ._fp8 import fp8_linear, rows_in_fp8
from ._op import explain, use_backend
from .causal_conv3d import causal_conv3d
from .causal_conv3d_moments import causal_conv3d_for_norm, causal_conv3d_moments
from .downsample_conv import downsample_conv
from .expert_layernorm import expert_layernorm
from .gated_expert_layernorm import gated_expert_layernorm
from .group_norm_silu import group_norm_silu
from .int8_joint_attention import int8_joint_attention
from .joint_attention import joint_attention
from .linear import linear
from .qk_norm_rope import qk_norm_rope
from .spatial_norm_silu import spatial_norm_silu
from .upsample_conv import upsample_conv

__all__ = [
    "causal_conv3d",
    "causal_conv3d_for_norm",
    "causal_conv3d_moments",
    "downsample_conv",
    "expert_layernorm",
    "explain",
    "fp8_linear",
    "gated_expert_layernorm",
    "group_norm_silu",
    "int8_joint_attention",
    "joint_attention",
    "linear",
    "qk_norm_rope",
    "rows_in_fp8",
    "spatial_norm_silu",
    "upsample_conv",
    "use_backend",
]
