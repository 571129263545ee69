"""What the timestep decides, for one call and for a whole schedule: shift, scale and gate of every norm.

S timesteps, B batch, D width. It does not depend on latents or text, so one table serves every clip and every step of a
schedule, and the weights that made it (a fifth of CogVideoX-2B's) are not needed beside it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Modulation(NamedTuple):
    """The modulation of one call; a batch of 1 serves any batch."""

    blocks: Tensor  # [B, layers, 2, 3, 2, D]: norm1 and norm2; shift, scale and gate; of text, then of vision
    last: Tensor  # [B, 2, D]: shift and scale of the norm before the last layer

    def expand(self, batch: int) -> "Modulation":
        """The same for every sample of a batch."""
        return Modulation(*(part.expand(batch, *part.shape[1:]) for part in self))

    def to(self, dtype: torch.dtype) -> "Modulation":
        return Modulation(*(part.to(dtype) for part in self))


class ModulationTable(nn.Module):
    """The modulation of every timestep of a schedule, at one ofs: `table.at(999)`."""

    def __init__(self, timesteps: Sequence[int], rows: Sequence[Modulation], ofs: float | None = None):
        super().__init__()
        self.timesteps, self.ofs = tuple(timesteps), ofs
        self.register_buffer("blocks", torch.cat([row.blocks for row in rows]), persistent=False)
        self.register_buffer("last", torch.cat([row.last for row in rows]), persistent=False)

    def at(self, *timesteps: int, ofs: float | None = None) -> Modulation:
        """The modulation of one timestep, or of one for each sample of a batch; an ofs of None is the table's.

        Raises ValueError for a timestep or an ofs that is not in the table.
        """
        rows = [self.row(timestep, ofs) for timestep in timesteps]
        if len(set(rows)) == 1:
            return Modulation(self.blocks[rows[0], None], self.last[rows[0], None])
        return Modulation(self.blocks[rows], self.last[rows])

    def row(self, timestep: int, ofs: float | None = None) -> int:
        if ofs not in (None, self.ofs):
            raise ValueError(f"ofs is {ofs}, but the modulation was kept for {self.ofs} when its weights were released")
        if timestep in self.timesteps:
            return self.timesteps.index(timestep)
        kept = ", ".join(map(str, self.timesteps[:3])) + (", ..." if len(self.timesteps) > 3 else "")
        raise ValueError(
            f"timestep {timestep} is not among the {len(self.timesteps)} whose modulation was kept ({kept}) when its "
            "weights were released; load the model again for another schedule"
        )
