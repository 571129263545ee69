"""What one stage found, kept in a file that is whole at any time, and how long the stage may go on."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

MARGIN = 0.92  # of its time a stage uses; the rest is for ending well


class Record:
    """The JSON of one stage: `<stage>.partial.json` while it runs, `<stage>.json` once it is done."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.end = path, time.monotonic() + MARGIN * seconds
        self.content: dict[str, Any] = {"rows": [], "left_out": []}

    @property
    def partial(self) -> Path:
        return self.path.with_suffix(".partial.json")

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def put(self, **fields: Any) -> None:
        """Facts about the whole stage."""
        self.content |= fields
        self._write()

    def add(self, **row: Any) -> None:
        """One measurement or test."""
        self.content["rows"].append(row)
        self._write()

    def leave_out(self, what: str) -> None:
        """Something for which there was no time."""
        self.content["left_out"].append(what)
        self._write()

    def finish(self) -> None:
        self._write()
        os.replace(self.partial, self.path)

    def _write(self) -> None:
        written = self.path.with_suffix(".writing")
        written.write_text(json.dumps(self.content, indent=1, default=str) + "\n")
        os.replace(written, self.partial)


def from_arguments() -> Record:
    """The record that the runner of stages asked for: `python -m gpu.<stage> FILE SECONDS`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("seconds", type=float)
    given = parser.parse_args()
    return Record(given.file, given.seconds)


def read(path: Path) -> dict[str, Any] | None:
    """What a stage left: all of it, or what it had when it was stopped, or None."""
    for candidate in (path, path.with_suffix(".partial.json")):
        if candidate.exists():
            return json.loads(candidate.read_text())
    return None
