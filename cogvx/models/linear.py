"""The fully connected layer of the models, by its published name and shape an ordinary nn.Linear."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvx_kernels import fp8_linear, linear, rows_in_fp8


class Linear(nn.Linear):
    """nn.Linear for tokens, [B, N, D]; LoRA and quantisation take it for one and may replace it or its weight."""

    products: str | None = None  # "fp8" has them taken in fp8, of the weight as it is at each call

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:  # [B, N, D] -> [B, N, K]
        if type(self.weight) not in (nn.Parameter, Tensor):  # quantised weights bring a product of their own
            y = super().forward(x)
            return F.gelu(y, approximate="tanh") if gelu else y
        if self.products == "fp8":
            return fp8_linear(x, *rows_in_fp8(self.weight), self.bias, gelu)
        return linear(x, self.weight, self.bias, gelu)


class WideLinear(nn.Linear):
    """nn.Linear that in fp16 computes, and answers, in fp32: half the memory of a weight in fp32, the same result."""

    @property
    def computed_in(self) -> torch.dtype:
        own = self.weight.dtype
        return torch.float32 if own == torch.float16 else own

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., K]
        bias = None if self.bias is None else self.bias.to(self.computed_in)
        return F.linear(x.to(self.computed_in), self.weight.to(self.computed_in), bias)


def take_over(new: nn.Linear, old: nn.Linear) -> None:
    """Make a fully connected layer of all that another one computes with, those very parameters."""
    nn.Module.__init__(new)
    new.in_features, new.out_features = old.in_features, old.out_features
    new.weight = old.weight
    new.register_parameter("bias", old.bias)
    new.products = getattr(old, "products", None)
    if hasattr(old, "form"):  # weights in 8 bits
        new.form, new.dtype, new.for_tokens = old.form, old.dtype, old.for_tokens
        new.register_buffer("scale", old.scale)
