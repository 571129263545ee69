"""LoRA on the transformer: a layer's weight W counts as W + weight * scale * up @ down, several added up.

Files in the naming of PEFT and diffusers, SAT, Kohya and CogVideoX-Fun are read (`lora_names`); diffusers' is written.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_tensors, save_tensors
from .linear import Linear, take_over
from .loading import SourceFile
from .lora_names import Pair, pairs
from .stored import CheckpointError, some
from .transformer import ExpertTransformer


@dataclass(frozen=True)
class LoRA:
    """One that is loaded: where it came from, and how much it counts."""

    file: str
    sha256: str
    weight: float
    alpha: float | None  # that was given in the place of the file's
    layers: dict[str, Pair]


def load_lora(
    transformer: ExpertTransformer,
    file: str | Path,
    weight: float = 1.0,
    name: str | None = None,
    alpha: float | None = None,
) -> str:
    """Add a LoRA to those that count; its name, which is the file's unless given.

    weight: how much it counts. alpha: in the place of the file's; SAT files do not hold it, and 1 is what they were
    trained with. Raises CheckpointError for a file that is no LoRA, or one of another model.
    """
    _refuse_fused(transformer, "load another")
    path = Path(file)
    name = _free_name(transformer, path) if name is None else name
    if not re.fullmatch(r"\w{1,100}", name) or name in transformer.loras:
        raise ValueError(f"name is {name!r}; it must be letters, digits and _ alone, and not in use")
    layers = read_lora(path, alpha)
    _check_fits(transformer, layers, path)
    transformer.loras[name] = LoRA(str(path), SourceFile(path).sha256, _checked("weight", weight), alpha, layers)
    for layer, pair in layers.items():
        adapt(transformer, layer).add(name, pair, weight)
    return name


def read_lora(file: str | Path, alpha: float | None = None) -> dict[str, Pair]:
    """What a LoRA's file adds to each layer, by our name. Raises CheckpointError for a file that is no LoRA."""
    tensors, metadata = load_tensors(file)
    return pairs(tensors, metadata, _checked("alpha", alpha), file)


def set_lora_weight(transformer: ExpertTransformer, name: str, weight: float) -> None:
    """How much a loaded LoRA counts: 0 not at all, 1 as trained."""
    _refuse_fused(transformer, "change a weight")
    lora = _loaded(transformer, name)
    transformer.loras[name] = replace(lora, weight=_checked("weight", weight))
    for layer in lora.layers:
        transformer.get_submodule(layer).weights[name] = weight


def unload_lora(transformer: ExpertTransformer, name: str | None = None) -> None:
    """Take one LoRA away, or all of them; what is left computes as if it had never been there."""
    unfuse_lora(transformer)
    for each in list(transformer.loras) if name is None else [name]:
        lora = _loaded(transformer, each)
        for layer in lora.layers:
            module = transformer.get_submodule(layer)
            module.remove(each)
            if not module.weights:
                transformer.set_submodule(layer, module.plain())
        del transformer.loras[each]


def fuse_lora(transformer: ExpertTransformer) -> None:
    """Compute the sums W + weight * scale * up @ down once, so that a call costs nothing more.

    The weights from before are kept, in the memory of the CPU, so that `unfuse_lora` brings back every bit. Raises
    ValueError for weights in 8 bits, beside which LoRAs can only be computed.
    """
    for module in _all_adapted(transformer):
        module.fuse()


def unfuse_lora(transformer: ExpertTransformer) -> None:
    for module in _all_adapted(transformer):
        module.unfuse()


def save_lora(transformer: ExpertTransformer, name: str, file: str | Path) -> None:
    """Write a loaded LoRA in diffusers' naming, at the weight 1.

    Readers of that naming take alpha for the rank, so a scale other than 1 is multiplied into the `lora_B` matrices.
    """
    write_lora(_loaded(transformer, name).layers, file)


def write_lora(layers: dict[str, Pair], file: str | Path) -> None:
    tensors = {}
    for layer, pair in layers.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = pair.down
        tensors[f"transformer.{layer}.lora_B.weight"] = (pair.up.double() * pair.scale).to(pair.up.dtype)
    save_tensors(tensors, file, {"format": "pt"})


def described(transformer: ExpertTransformer) -> list[dict[str, Any]]:
    """The loaded LoRAs as a video's metadata holds them: what it takes to load them again."""
    # Fused ones are rounded together with the weights.
    how = {"fused": True} if any(module.original is not None for module in _all_adapted(transformer)) else {}
    return [
        {"name": name, "file": lora.file, "sha256": lora.sha256, "weight": lora.weight}
        | ({} if lora.alpha is None else {"alpha": lora.alpha}) | how
        for name, lora in transformer.loras.items()
    ]  # fmt: skip


class AdaptedLinear(Linear):
    """A fully connected layer with LoRAs beside it, under its old name and with its own parameters.

    The LoRAs' matrices move with the model and are no part of what it saves.
    """

    def __init__(self, layer: nn.Linear):
        take_over(self, layer)
        self.kind = type(layer)
        self.weights: dict[str, float] = {}
        self.scales: dict[str, float] = {}
        self.original: Tensor | None = None  # while fused

    def add(self, name: str, pair: Pair, weight: float) -> None:
        for part, matrix in (("down", pair.down), ("up", pair.up)):
            like = {"device": self.weight.device, "dtype": getattr(self, "dtype", self.weight.dtype)}
            self.register_buffer(f"{part}_{name}", matrix.to(**like), persistent=False)
        self.weights[name], self.scales[name] = weight, pair.scale

    def remove(self, name: str) -> None:
        delattr(self, f"down_{name}")
        delattr(self, f"up_{name}")
        del self.weights[name], self.scales[name]

    def plain(self) -> nn.Linear:
        layer = self.kind.__new__(self.kind)
        take_over(layer, self)
        return layer.train(self.training)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        y = self.kind.forward(self, x)
        for name, weight in self.weights.items() if self.original is None else ():
            low = F.linear(x, getattr(self, f"down_{name}"))
            y = torch.add(y, F.linear(low, getattr(self, f"up_{name}")), alpha=weight * self.scales[name])
        return F.gelu(y, approximate="tanh") if gelu else y

    @torch.no_grad()
    def fuse(self) -> None:
        if self.original is not None:
            return
        if hasattr(self, "form"):
            what = "to which the sum would be rounded; leave the LoRAs beside them"
            raise ValueError(f"the weights of this transformer are in {self.form}, {what}")
        self.original = self.weight.detach().to("cpu", copy=True)
        total = self.weight.float()
        for name, weight in self.weights.items():
            product = getattr(self, f"up_{name}").float() @ getattr(self, f"down_{name}").float()
            total = total + weight * self.scales[name] * product
        self.weight.copy_(total)

    @torch.no_grad()
    def unfuse(self) -> None:
        if self.original is not None:
            self.weight.copy_(self.original)
            self.original = None


def _free_name(transformer: ExpertTransformer, file: Path) -> str:
    stem, count = re.sub(r"\W", "_", file.stem)[:90], 2
    name = stem
    while name in transformer.loras:
        name, count = f"{stem}_{count}", count + 1
    return name


def adapt(transformer: ExpertTransformer, name: str) -> AdaptedLinear:
    """The layer of that name, which from now on has LoRAs beside it."""
    layer = transformer.get_submodule(name)
    if not isinstance(layer, AdaptedLinear):
        layer = AdaptedLinear(layer).train(layer.training)
        transformer.set_submodule(name, layer)
    return layer


def _all_adapted(transformer: ExpertTransformer) -> list[AdaptedLinear]:
    return [module for module in transformer.modules() if isinstance(module, AdaptedLinear)]


def _check_fits(transformer: ExpertTransformer, layers: dict[str, Pair], file: Path) -> None:
    present = {name: list(m.weight.shape) for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    absent = sorted(layers.keys() - present.keys())
    shapes = {name: [pair.up.shape[0], pair.down.shape[1]] for name, pair in layers.items()}
    wrong = [f"{n} is {shape}, here {present[n]}" for n, shape in shapes.items() if present.get(n, shape) != shape]
    faults = [f"{len(absent)} layers are not in this one ({some(absent)})"] if absent else []
    faults += [f"{len(wrong)} layers have another size ({some(wrong)})"] if wrong else []
    if faults:
        raise CheckpointError(f"{file} is a LoRA for another model: {'; '.join(faults)}")
    for name, pair in layers.items():
        if not (pair.down.is_floating_point() and pair.up.is_floating_point() and math.isfinite(pair.scale)):
            raise CheckpointError(f"{file}: {name} holds no finite numbers")


def _refuse_fused(transformer: ExpertTransformer, what: str) -> None:
    if any(module.original is not None for module in _all_adapted(transformer)):
        raise ValueError(f"the LoRAs of this transformer are fused; unfuse them to {what}")


def _loaded(transformer: ExpertTransformer, name: str) -> LoRA:
    if name not in transformer.loras:
        raise ValueError(f"name is {name!r}; loaded are {', '.join(transformer.loras) or 'none'}")
    return transformer.loras[name]


def _checked(name: str, value: float | None) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if value is None and name == "alpha":
        return None
    if not number:
        raise ValueError(f"{name} is {value!r}; it must be a finite number")
    return float(value)
