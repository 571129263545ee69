"""The fully connected layer of the models, by its published name and shape an ordinary nn.Linear."""

import torch.nn.functional as F
from torch import Tensor, nn

from cogvx_kernels import linear


class Linear(nn.Linear):
    """nn.Linear for tokens, [B, N, D]; LoRA and quantisation take it for one and may replace it or its weight."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:  # [B, N, D] -> [B, N, K]
        if type(self.weight) not in (nn.Parameter, Tensor):  # quantised weights bring a product of their own
            y = super().forward(x)
            return F.gelu(y, approximate="tanh") if gelu else y
        return linear(x, self.weight, self.bias, gelu)
