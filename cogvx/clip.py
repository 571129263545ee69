"""A finished video, with everything that it takes to make it again."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .data.video import write_video


@dataclass(frozen=True)
class Clip:
    """Frames, their rate, and how they were made."""

    frames: np.ndarray  # uint8 [T, H, W, 3]
    fps: int
    metadata: dict = field(default_factory=dict)  # what the file carries; the same clip has the same
    seconds: float = 0.0  # that it took to make

    def save(self, path: str | os.PathLike) -> Path:
        """Write an H.264 mp4 that carries the metadata; the file appears whole or not at all."""
        write_video(path, self.frames, self.fps, self.metadata)
        return Path(path)


@dataclass(frozen=True)
class Written:
    """A video that went into a file frame by frame, and how it was made."""

    path: Path
    metadata: dict
    seconds: float  # that it took to make and to write
