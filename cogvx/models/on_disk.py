"""Files that are on the disk whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary name beside `file` to write under; what is there takes its place at the end, or goes on any error."""
    partial = file.with_name(f".{file.name}.partial-{secrets.token_hex(4)}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
