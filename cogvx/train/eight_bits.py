"""AdamW whose two moments take a byte a number each, through torchao.

Source: "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861); torchao.optim.AdamW8bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

with unset_fake_temporarily():  # they read values, which tensors that only count memory have not
    get_qmap_signed(), get_qmap_unsigned()


class AdamW8(AdamW8bit):
    """torchao's AdamW, computed without a compiler, whose state is made of plain tensors.

    Moments of weights of fewer than 4,096 numbers, or of a count that is no multiple of 256, stay as they are. The
    learning rate of a group is a tensor, to be filled.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        # Compiled it would need a C++ compiler, minutes at first, and would round as the compiler's version likes.
        with torch.compiler.set_stance("force_eager"):
            return super().step(closure)

    def state_dict(self) -> dict:
        state = super().state_dict()
        return state | {"state": {i: {k: _plain(v) for k, v in each.items()} for i, each in state["state"].items()}}

    def load_state_dict(self, state: dict) -> None:
        whole = {i: {k: _quantised(v) for k, v in each.items()} for i, each in state["state"].items()}
        super().load_state_dict(state | {"state": whole})


def _plain(value: Tensor) -> Tensor | dict:
    if not isinstance(value, OptimState8bit):
        return value
    return {"codes": value.codes, "scale": value.scale, "signed": bool(value.signed)}


def _quantised(value: Tensor | dict) -> Tensor:
    if not isinstance(value, dict):
        return value
    values = get_qmap_signed() if value["signed"] else get_qmap_unsigned()
    table = torch.tensor(values, device=value["codes"].device)
    return OptimState8bit(value["codes"], value["scale"], table, value["signed"], torch.float32)
