"""The VAE split in time: the chunks of a clip dealt out to processes, which compute a round of them at once.

A chunk needs of the one before no more than each convolution's halo, the two frames that it read last. These go from
process to process as each layer is done, so that all chunks of a round run layer by layer beside each other, one layer
apart. A norm sees one chunk, as ever: the result is bit for bit that of one process.

B batch, C channels, T frames, H W height and width.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.fp16 import overflowed
from ..models.vae import CausalConv3d, Decoder, Encoder, Halos, in_chunks
from .layers import Layer, layers_of, result_shape
from .links import Link

HALO = 2  # frames that a convolution sees of the chunk before


class DealtChunks:
    """`vae.tiling = DealtChunks(link, wrap, num)`: chunk i is computed by process i of the first `num`, in turns.

    Every process gets every result. wrap: the same processes as link, by a way of their own for what the last one
    passes on to the first, so that nothing that is fetched later stands before something that is waited for.
    """

    def __init__(self, link: Link, wrap: Link, num: int):
        self.link, self.wrap, self.num = link, wrap, num
        self.held: list[Tensor] = []  # halos for the first process, which fetches them next round
        self.on_their_way: list[tuple[dist.Work, Tensor]] = []

    def __call__(
        self, half: Encoder | Decoder, chunks: Iterable[Tensor], num_chunks: int, first_alone: bool = True
    ) -> Iterator[Tensor]:
        """What `in_chunks` gives. In fp16 chunks are kept: what overflows is computed by every process for itself."""
        if num_chunks == 1:
            yield from in_chunks(half, chunks, num_chunks, False, first_alone)
            return
        given, kept, done, self.held = iter(chunks), [], 0, []
        while turn := list(islice(given, self.num)):
            self._hand_on()
            kept += turn if turn[0].dtype == torch.float16 else []
            made = self.computed(half, turn, done, num_chunks, first_alone)
            if overflowed(*made):
                again = (chunk for part in (kept, given) for chunk in part)
                yield from islice(in_chunks(half, again, num_chunks, False, first_alone), done, None)
                break
            yield from made
            done += len(turn)
        self._arrive()

    def computed(
        self, half: Encoder | Decoder, turn: list[Tensor], done: int, num_chunks: int, first_alone: bool
    ) -> list[Tensor]:
        """The results of a round, whose first chunk is number `done` of the clip."""
        rank, made = self.link.rank, None
        if rank < len(turn):
            halos = PassedHalos(self, half, turn[rank], done + rank, num_chunks)
            halos.first_alone = first_alone and done + rank == 0
            made = half(turn[rank], halos)
            self._arrive()
            self.held = halos.wrapped
            self.link.end([work for work, _ in halos.sent])
        results = []
        for i, chunk in enumerate(turn):
            shape = result_shape(half, chunk.shape, first_alone and done + i == 0)
            y = made if i == rank else torch.empty(shape, dtype=chunk.dtype, device=chunk.device)
            results.append(self.link.shared("frames", y, i))
        return results

    def _hand_on(self) -> None:
        """Send the halos of the round before; only now, since a round that overflowed or was given up has no next."""
        self.on_their_way = [(self.wrap.send("halos", frames, 0), frames) for frames in self.held]
        self.held = []

    def _arrive(self) -> None:
        self.wrap.end([work for work, _ in self.on_their_way])
        self.on_their_way = []


class PassedHalos(Halos):
    """The halos of one chunk, from the process that computes the chunk before, to the one with the next."""

    def __init__(self, dealt: DealtChunks, half: Encoder | Decoder, chunk: Tensor, number: int, num_chunks: int):
        super().__init__()
        self.dealt, self.chunk = dealt, chunk
        self.layers = {layer.module: layer for layer in layers_of(half, chunk.shape, True)}
        self.is_first, self.is_last = number == 0, number == num_chunks - 1
        self.sent: list[tuple[dist.Work, Tensor]] = []
        self.wrapped: list[Tensor] = []

    def take(self, conv: CausalConv3d, device: torch.device) -> Tensor | None:
        if self.is_first:
            return None
        link, source = self.dealt.link, self.dealt.link.rank - 1
        if source < 0:
            link, source = self.dealt.wrap, self.dealt.num - 1
        return link.receive(halo_shape(self.layers[conv]), self.chunk, source).permute(0, 4, 1, 2, 3)

    def keep(self, conv: CausalConv3d, frames: Tensor) -> None:
        if self.is_last:
            return
        link, target = self.dealt.link, self.dealt.link.rank + 1
        frames = frames.permute(0, 2, 3, 4, 1).clone(memory_format=torch.contiguous_format)
        if target == self.dealt.num:
            self.wrapped.append(frames)
        else:
            self.sent.append((link.send("halos", frames, target), frames))


def halo_shape(layer: Layer) -> tuple[int, ...]:  # B, 2, H, W, C
    """Of what a convolution passes on; channels last, as it is sent."""
    batch, channels, _, height, width = layer.shape
    return batch, HALO, height, width, channels
