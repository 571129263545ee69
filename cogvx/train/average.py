"""A running average of weights, which makes better videos than the weights themselves."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .shards import slice_like


class Average:
    """Exponential moving average of named parameters, in fp32 at least: `a <- decay a + (1 - decay) w` a step."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must be from 0 to below 1")
        self.parameters, self.decay = dict(parameters), decay
        self.values = {name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                       for name, p in self.parameters.items()}  # fmt: skip

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter.to(self.values[name].dtype), 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Put the averages into the model and keep its weights here; a second call undoes it."""
        for name, parameter in self.parameters.items():
            own = parameter.to(self.values[name].dtype, copy=True)
            parameter.copy_(self.values[name])
            self.values[name] = own

    def state_dict(self) -> dict[str, Tensor]:
        return self.values

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state.keys() != self.values.keys():
            raise ValueError(f"the averages are of {len(state)} weights, not of these {len(self.values)}")
        for name, value in state.items():
            self.values[name].copy_(slice_like(self.values[name], value))
