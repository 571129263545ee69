"""Runs a plan: weights go to the device when they are needed, and make room again.

The moves are the same on every device. On a GPU a block's weights come from pinned memory on a stream of their own,
while the block before it computes; on a CPU they are plain copies, so that a run there holds what is predicted.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..host import host_memory, to_device
from ..models.eight_bits import to_eight_bits
from ..models.transformer import ModulatedNorm
from .plan import Plan

BLOCKED = ("text_encoder", "transformer")  # the parts that are blocks, all alike


class Placed:
    """The parts of a pipeline where a plan wants them: `with placed.at_work("vae"): ...`.

    parts: "text_encoder", "transformer" and "vae".
    """

    def __init__(self, plan: Plan, parts: dict[str, nn.Module], device: torch.device):
        self.plan, self.device, self.parts = plan, device, parts
        self.hooks: list[RemovableHandle] = []
        round_weights(plan, parts, device)
        self.place()
        vae = parts["vae"]
        vae.tiling, vae.halos_on_host = plan.tiling, plan.halos_on_host

    def place(self) -> None:
        """Find every weight, and bring it to where it is to wait."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.whole: dict[str, Waiting] = {}
        self.modulation: list[Waiting] = []  # what makes the norms' shifts and scales, before the first step alone
        self.streams: dict[str, Stream] = {}
        self.loras = self.loaded_loras()
        pinned = Pinned() if self.device.type == "cuda" else None
        for name, part in self.parts.items():
            place, device = getattr(self.plan, name), self.device
            if place == "resident":
                if any(weight.device != device for weight in (*part.parameters(), *part.buffers())):
                    part.to(device)
                continue
            blocks = blocks_of(part) if place == "streamed" else []
            modulating = [module.linear for module in part.modules() if isinstance(module, ModulatedNorm)]
            modulating = [list(linear.modules()) for linear in modulating if linear]
            for modules in modulating:
                self.modulation.append(come_and_go(modules[0], Waiting(modules, device, pinned), self.hooks))
            apart = {id(module) for group in (*blocks, *modulating) for module in group}
            self.whole[name] = Waiting([module for module in part.modules() if id(module) not in apart], device, pinned)
            if blocks:
                waiting = [Waiting(block, device, pinned) for block in blocks]
                self.streams[name] = Stream(waiting, blocks, device, self.hooks)

    def loaded_loras(self) -> list[dict]:
        """The layers of each; another LoRA of the same name has others."""
        return [lora.layers for lora in getattr(self.parts["transformer"], "loras", {}).values()]

    @contextmanager
    def at_work(self, name: str) -> Iterator[None]:
        """While a part computes: what visits is there, what streams may come.

        "modulation" is the part of the transformer that works before the first step. LoRAs that came or went since
        the last time are taken along.
        """
        if name == "transformer":
            loaded = self.loaded_loras()
            if len(loaded) != len(self.loras) or any(a is not b for a, b in zip(loaded, self.loras, strict=True)):
                self.place()
        waiting = self.modulation if name == "modulation" else [self.whole[name]] if name in self.whole else []
        try:
            for weights in waiting:
                weights.install(weights.fetch())
            yield
        finally:
            for weights in waiting:
                weights.leave()
            if name in self.streams:
                self.streams[name].forget()

    def recorded(self, guided: bool, batch_size: int) -> dict[str, dict]:
        """What a video carries of the plan: all of it where it may have changed the video, else nothing."""
        return {"plan": self.plan.as_dict()} if self.plan.rounds_otherwise(guided, batch_size) else {}

    def moved(self, steps: float = 1.0) -> dict[str, int]:
        """Bytes of weights brought to the device so far, by part; those of the transformer's blocks `steps` times."""
        moved = {name: weights.moved for name, weights in self.whole.items()}
        for name, stream in self.streams.items():
            streamed = sum(weights.moved for weights in stream.weights)
            moved[name] += round(steps * streamed) if name == "transformer" else streamed
        moved["transformer"] = moved.get("transformer", 0) + sum(weights.moved for weights in self.modulation)
        return moved


def round_weights(plan: Plan, parts: dict[str, nn.Module], device: torch.device) -> None:
    """Keep the weights of the given parts as a plan has them, in memory that they wait in."""
    for name in parts.keys() & set(BLOCKED) if plan.weights else ():
        with nullcontext() if getattr(plan, name) == "resident" else host_memory():
            to_eight_bits(parts[name], plan.weights, device)


class Pinned:
    """Copies of tensors in pinned memory, many in one piece of it.

    The allocator of pinned memory rounds every request up to a power of two: for the matrices of a 5B transformer one
    by one, to 1.8 times what they take.
    """

    def __init__(self, piece: int = 2**28, pin: bool = True):
        self.piece, self.pin, self.pieces = piece, pin, []  # each [bytes, how many of them are taken]

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor in pinned memory, with the same strides; itself where it is there."""
        if tensor.is_pinned():
            return tensor
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        nbytes = span * tensor.itemsize if tensor.numel() else 0
        taken = -(-nbytes // 512) * 512  # as aligned as the device's allocator makes it
        piece = next((piece for piece in self.pieces if len(piece[0]) - piece[1] >= taken), None)
        if piece is None:
            piece = [torch.empty(max(taken, self.piece), dtype=torch.uint8, pin_memory=self.pin), 0]
            self.pieces.append(piece)
        memory, start = piece
        piece[1] += taken
        there = memory[start : start + nbytes].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        return there.copy_(tensor)


class Waiting:
    """The weights that modules hold themselves; on the host, and for a while on the device too.

    pinned: where they wait for a GPU.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device, pinned: Pinned | None = None):
        self.device, self.owners, self.host, self.moved = device, [], [], 0
        places: dict[int, int] = {}  # of a tensor that two modules share, once
        for module in modules:
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in places:
                        places[id(tensor)] = len(self.host)
                        self.host.append(_waiting(tensor, pinned))
                    self.owners.append((table, name, places[id(tensor)]))
        self.leave()

    def fetch(self) -> list[Tensor]:
        self.moved += sum(tensor.nbytes for tensor in self.host)
        if self.device.type == "cuda":
            return [tensor.to(self.device, non_blocking=True) for tensor in self.host]
        return [to_device(tensor, self.device) for tensor in self.host]

    def install(self, tensors: list[Tensor]) -> None:
        self.here = tensors is not self.host
        for table, name, place in self.owners:
            tensor = tensors[place]
            is_parameter = isinstance(table[name], nn.Parameter)
            table[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor

    def leave(self) -> None:
        self.install(self.host)


class Stream:
    """Blocks whose weights come one after another, the next one's while one computes."""

    def __init__(
        self, weights: list[Waiting], blocks: list[list[nn.Module]], device: torch.device, hooks: list[RemovableHandle]
    ):
        self.weights, self.ready = weights, {}
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        for i, block in enumerate(blocks):
            hooks.append(block[0].register_forward_pre_hook(lambda *_, i=i: self.enter(i)))
            hooks.append(block[0].register_forward_hook(lambda *_, i=i: self.weights[i].leave()))

    def enter(self, i: int) -> None:
        if i not in self.ready:
            self.ready[i] = self.fetch(i)
        tensors, event = self.ready.pop(i)
        if event is not None:
            torch.cuda.current_stream(self.side.device).wait_event(event)
        self.weights[i].install(tensors)
        following = (i + 1) % len(self.weights)
        if following != i:
            self.ready[following] = self.fetch(following)

    def fetch(self, i: int) -> tuple[list[Tensor], "torch.cuda.Event | None"]:
        if self.side is None:
            return self.weights[i].fetch(), None
        # What is on its way must not take memory that a kernel in flight still reads. So the side stream waits here,
        # and the weights that come next take the memory of those that left: `record_stream` instead would hold that
        # back until the kernels are done, while the host is whole blocks ahead of them and asks for more each time.
        self.side.wait_stream(torch.cuda.current_stream(self.side.device))
        with torch.cuda.stream(self.side):
            return self.weights[i].fetch(), self.side.record_event()

    def forget(self) -> None:
        """Nothing is on its way any more, nor left on the device by a call that ended in an error."""
        self.ready.clear()
        for weights in self.weights:
            weights.leave()


def come_and_go(module: nn.Module, weights: Waiting, hooks: list[RemovableHandle]) -> Waiting:
    """Weights that are on the device during their module's own call alone, unless they are already there."""
    own: list[bool] = []

    def before(*given: object) -> None:
        own.append(not weights.here)
        if own[-1]:
            weights.install(weights.fetch())

    def after(*given: object) -> None:
        if own.pop():
            weights.leave()

    hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    return weights


def blocks_of(part: nn.Module) -> list[list[nn.Module]]:
    """The blocks of a transformer or a T5 encoder, each with all modules in it.

    What modulates the transformer's norms is called for all blocks at once, before the first one runs, and so is no
    part of them.
    """
    found = part.transformer_blocks if hasattr(part, "transformer_blocks") else part.encoder.block
    apart = {id(m.linear) for m in part.modules() if isinstance(m, ModulatedNorm)}
    return [[module for module in block.modules() if id(module) not in apart] for block in found]


def _waiting(tensor: Tensor, pinned: Pinned | None) -> Tensor:
    with host_memory():
        host = tensor.detach().to("cpu")
        return pinned.copy(host) if pinned else host
