"""Training of a LoRA: small matrices beside the transformer's fully connected layers, whose own weights stand still.

Source: "LoRA" (arXiv 2106.09685).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.linear import Linear
from ..models.lora import write_lora
from ..models.lora_names import Pair
from ..models.transformer import ExpertTransformer
from .options import TrainingError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class LearningLinear(Linear):
    """A layer W that counts as W + alpha / rank * up @ down, where up and down learn and W does not."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.scale = layer.weight, layer.bias, alpha / rank
        # In fp32 whatever the layer is: steps of a learning rate are lost in 8 bits of mantissa.
        down, device = torch.empty(rank, self.in_features, device="cpu"), layer.weight.device
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # on the host: a GPU's numbers are others on another GPU
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        y = super().forward(x)
        y = y + self.scale * F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype)).to(y.dtype)
        return F.gelu(y, approximate="tanh") if gelu else y


def targeted(model: ExpertTransformer, targets: Sequence[str]) -> list[str]:
    """The layers whose names end in one of `targets`. Raises TrainingError for a target that no layer has."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in targets}
    for target in targets:
        if not found[target]:
            ends = sorted({name.split(".", 2)[-1] for name in linear if name.startswith("transformer_blocks.0.")})
            raise TrainingError(f"lora.targets holds {target!r}, which no layer is called; there are {', '.join(ends)}")
    return sorted({name for names in found.values() for name in names})


def add_lora(
    model: ExpertTransformer, rank: int, alpha: float, targets: Sequence[str] = ATTENTION
) -> dict[str, nn.Parameter]:
    """Put matrices of random `down` and zero `up` beside every layer whose name ends in one of `targets`.

    All other weights stop learning. Returns what learns, by name. Raises TrainingError for a target that no layer has.
    """
    names = targeted(model, targets)
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LearningLinear(model.get_submodule(name), rank, alpha))
    return {name: p for name, p in model.named_parameters() if name.endswith((".down", ".up"))}


def save_learnt(model: ExpertTransformer, file: Path) -> None:
    """Write what was learnt in diffusers' naming, alpha / rank multiplied in."""
    layers = {
        name: Pair(module.down.detach(), module.up.detach(), module.scale)
        for name, module in model.named_modules()
        if isinstance(module, LearningLinear)
    }
    write_lora(layers, file)
