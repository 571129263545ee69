"""The processes of a run: each computes a part of every step's samples, and all keep the same weights.

    torchrun --nproc-per-node 2 -m cogvx train transformer run.toml

What a step consists of does not depend on how many there are, so a run goes on with any other number of processes.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

Item = TypeVar("Item")


class Ranks:
    """All processes of a group; without one, this process alone."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Of what all compute together, what this process does; it may be none."""
        return items[self.rank :: self.size]

    def share_evenly(self, items: Sequence[Item]) -> list[tuple[Item, float]]:
        """The same where each process must compute as often as all others: items, and how much each counts, 1 or 0.

        Who would have fewer than the others does one again, which counts for nothing.
        """
        own, most = self.share(items), -(-len(items) // self.size)
        return [(item, 1.0) for item in own] + [(items[0], 0.0)] * (most - len(own))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the sum of all gradients; those of weights that are shared out are summed already."""
        for parameter in parameters if self.group is not None else ():
            if isinstance(parameter, DTensor):
                continue
            if parameter.grad is None:  # this process had no sample
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self.group)

    def added(self, value: float, device: torch.device) -> float:
        """The sum of all processes' values."""
        if self.group is None:
            return value
        # On the device, as some ways of communication know no other place.
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.group)
        return total.item()

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.group is not None:
            dist.barrier(self.group)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process do something before the others do it, who then find it done."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()


ALONE = Ranks()
TO_ENCODE = timedelta(days=2)  # others wait for the first process, which encodes all clips and captions


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that torchrun has started, whose devices are of the type `device`; else this one alone."""
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TO_ENCODE)
    try:
        yield Ranks(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
