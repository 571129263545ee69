"""The two sides of guidance in two groups of processes: one predicts without the prompt, the other with it."""

from torch import Tensor

from ..diffusion.guidance import Together
from .links import Link


class Apart(Together):
    """Process 0 of the link has the first half of a guided batch, process 1 the second; both know what both found."""

    def __init__(self, link: Link):
        self.link = link

    def own(self, x: Tensor) -> Tensor:
        return x.chunk(2)[self.link.rank]

    def both(self, x: Tensor) -> Tensor:
        return self.link.gathered("sides", x, [len(x)] * 2, dim=0)
