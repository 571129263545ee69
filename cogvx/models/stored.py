"""Tensors in files, known by name, shape and type before any is read."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(ValueError):
    """A folder or file that is no checkpoint, or a damaged, incomplete or unsafe one; one short printable line."""

    def __init__(self, message: str):  # names come from the files, which may hold anything
        short = message if len(message) <= 900 else message[:600] + " ... " + message[-295:]
        super().__init__("".join(letter if letter.isprintable() else "?" for letter in short))


@dataclass(frozen=True)
class Stored:
    """A tensor that has not been read yet."""

    shape: list[int]
    dtype: str  # as safetensors calls it; a model takes those of DTYPES
    read: Callable[[], Tensor]

    def rows(self, parts: int, taken: tuple[int, ...]) -> "Stored":
        """Some of the `parts` equal pieces along the first axis, joined in the order of `taken`."""
        if parts == 1:
            return self
        length = self.shape[0] // parts if self.shape else 0
        shape = [length * len(taken), *self.shape[1:]] if length * parts == sum(self.shape[:1]) else []
        return Stored(shape, self.dtype, lambda: torch.cat([self.read().chunk(parts)[i] for i in taken]))


@contextmanager
def opened(files: list[Path]) -> Iterator[list[tuple[str, Stored]]]:
    """What the safetensors files hold, in the order of files and names; a name may come twice. Errors become ours."""
    with ExitStack() as stack:
        tensors = [(file, stack.enter_context(opened_file(file))) for file in files]
        stored = []
        for file, content in tensors:
            with our_errors(file):
                stored += [(key, _lazily(file, content, key)) for key in sorted(content.keys())]
        yield stored


@contextmanager
def opened_file(file: Path) -> Iterator[Any]:
    """A safetensors file, whose errors become ours."""
    with our_errors(file), safe_open(file, framework="pt") as tensors:
        yield tensors


@contextmanager
def our_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is no intact safetensors file: {one_line(error)}") from error


def _lazily(file: Path, content: Any, key: str) -> Stored:
    def read() -> Tensor:
        with our_errors(file):
            return content.get_tensor(key)

    slice_of = content.get_slice(key)
    return Stored(slice_of.get_shape(), slice_of.get_dtype(), read)


def some(names: list[str]) -> str:
    """The first three names, each cut short, and how many more there are."""
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name if len(name) <= 100 else name[:97] + "..." for name in names[:3]) + more


def one_line(error: BaseException) -> str:
    """The first line of an error, at most 200 characters."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
