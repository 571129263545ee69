"""How a number of things is split over processes that need not divide it."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise


def lengths(total: int, size: int) -> list[int]:
    """How many of `total` things each of `size` processes has: the first ones one more where it does not divide."""
    return [total // size + (i < total % size) for i in range(size)]


def spans(parts: list[int]) -> list[slice]:
    """Where each of some parts lies, one after another."""
    return [slice(start, stop) for start, stop in pairwise([0, *accumulate(parts)])]


@dataclass(frozen=True)
class Layout:
    """Which tokens of a sequence, its text first, each process of a table has, row by row."""

    num_tokens: int
    num_text: int
    columns: int  # processes that trade heads
    rows: int  # that hand keys round

    @cached_property
    def spans(self) -> list[slice]:
        return spans(lengths(self.num_tokens, self.rows * self.columns))

    def text(self, process: int) -> slice:
        """Of the text tokens, those of a process."""
        return _clipped(self.spans[process], 0, self.num_text)

    def vision(self, process: int) -> slice:
        """Of the vision tokens, those of a process."""
        return _clipped(self.spans[process], self.num_text, self.num_tokens)

    def tokens_in(self, row: int) -> list[int]:
        """How many tokens each process of a row has."""
        return [length(self.spans[row * self.columns + i]) for i in range(self.columns)]

    def vision_in(self, row: int) -> list[int]:
        return [length(self.vision(row * self.columns + i)) for i in range(self.columns)]

    @property
    def tokens_of_rows(self) -> list[int]:
        return [sum(self.tokens_in(row)) for row in range(self.rows)]

    @property
    def vision_of_rows(self) -> list[int]:
        return [sum(self.vision_in(row)) for row in range(self.rows)]


def length(span: slice) -> int:
    return span.stop - span.start


def _clipped(span: slice, start: int, stop: int) -> slice:
    """The part of a span that lies between, counted from `start`; both ends are the same where there is none."""
    first = min(max(span.start, start), stop)
    return slice(first - start, max(first, min(span.stop, stop)) - start)
