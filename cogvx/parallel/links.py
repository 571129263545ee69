"""What processes send each other: every byte passes here, and is counted.

A count is of what one process hands out: to how many it goes counts, how a library routes it does not. A process that
has ended makes the others' calls fail; the error says which one, where that can be known (`cogvx.parallel.watch`).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


class ParallelError(ValueError):
    """Processes that cannot share the work, or have lost one of them; the message says what to do."""


def unexplained(error: RuntimeError) -> str:
    """Where nobody watches the processes."""
    return f"another process has ended or cannot be reached ({str(error).splitlines()[0][:200]})"


@dataclass(frozen=True)
class Link:
    """One group of processes, of which this one is number `rank`.

    sent: bytes handed out so far, by what they were for. Raises ParallelError where another process has ended.
    """

    group: dist.ProcessGroup
    sent: Counter[str] = field(default_factory=Counter)
    explain: Callable[[RuntimeError], str] = unexplained

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def exchange(self, what: str, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Give part i to process i; what each of them gave to this one, in these shapes, of the dtype of the parts."""
        given, counts = [part.numel() for part in parts], [math.prod(shape) for shape in shapes]
        flat, received = (parts[0].new_empty(sum(each)) for each in (given, counts))
        for place, part in zip(flat.split(given), parts, strict=True):
            place.view(part.shape).copy_(part)
        self.sent[what] += sum(part.nbytes for i, part in enumerate(parts) if i != self.rank)
        sizes = ([count * flat.itemsize for count in each] for each in (counts, given))
        with self._watched():
            dist.all_to_all_single(_bytes(received), _bytes(flat), *sizes, group=self.group)
        return [part.view(*shape) for part, shape in zip(received.split(counts), shapes, strict=True)]

    def gathered(self, what: str, own: Tensor, lengths: Sequence[int], dim: int) -> Tensor:
        """All processes' tensors, one after another along `dim`, where that of process i is lengths[i] long."""
        if self.size == 1:
            return own
        shapes = [[*own.shape[:dim], length, *own.shape[dim + 1 :]] for length in lengths]
        return torch.cat(self.exchange(what, [own] * self.size, shapes), dim=dim)

    def handed_round(self, what: str, own: Tensor, shapes: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Every process's tensor, the own one first, each on its way while the one before is used."""
        held, number = own.contiguous(), self.rank
        for left in range(self.size - 1, -1, -1):
            following = (number - 1) % self.size
            work, coming = [], None
            if left:
                coming = torch.empty(tuple(shapes[following]), dtype=own.dtype, device=own.device)
                work = self._swap(what, held, coming)
            yield held
            self.end(work)
            held, number = coming, following

    def shared(self, what: str, x: Tensor, source: int) -> Tensor:
        """The tensor of process `source`, in every one of them; the others' x says shape and dtype, and is filled."""
        x = x.contiguous()
        if self.rank == source:
            self.sent[what] += x.nbytes * (self.size - 1)
        with self._watched():
            dist.broadcast(_bytes(x), group=self.group, group_src=source)
        return x

    def send(self, what: str, x: Tensor, target: int) -> dist.Work:
        """Begin to send; x must stay as it is until the end of the work."""
        self.sent[what] += x.nbytes
        with self._watched():
            return dist.isend(_bytes(x), group=self.group, group_dst=target)

    def receive(self, shape: Sequence[int], like: Tensor, source: int) -> Tensor:
        received = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        with self._watched():
            dist.recv(_bytes(received), group=self.group, group_src=source)
        return received

    def end(self, work: Sequence[dist.Work]) -> None:
        with self._watched():
            for one in work:
                one.wait()

    def _swap(self, what: str, given: Tensor, coming: Tensor) -> list[dist.Work]:
        self.sent[what] += given.nbytes
        target, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        with self._watched():
            return dist.batch_isend_irecv([
                dist.P2POp(dist.isend, _bytes(given), group=self.group, group_peer=target),
                dist.P2POp(dist.irecv, _bytes(coming), group=self.group, group_peer=source),
            ])  # fmt: skip

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of any backend: there is no class of their own below it for all
            raise ParallelError(self.explain(error)) from error


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor: bytes are what every backend can send."""
    return x.view(-1).view(torch.uint8)
