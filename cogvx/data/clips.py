"""A folder of clips with captions: every `name.mp4` has its caption in `name.txt` beside it.

All of it is checked before anything is computed, so that no run stops hours later at a damaged file.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .video import VideoError, read_video

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")


class DataError(ValueError):
    """A folder of clips that cannot be trained on; the message counts and names what is wrong."""


@dataclass(frozen=True)
class Clip:
    """A clip on disk that can be trained on."""

    file: Path
    caption: str
    sha256: str  # of the file
    num_frames: int  # those that are used, from the first on: 8N+1
    height: int
    width: int

    def read(self) -> np.ndarray:  # uint8 [T, H, W, 3]
        return read_video(self.file)[0][: self.num_frames]


@dataclass
class Report:
    """What was found in a folder."""

    clips: list[Clip] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)  # what is wrong to the files' names

    def __str__(self) -> str:
        lines = [f"{len(self.clips)} clips can be trained on"]
        for what, names in self.faults.items():
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            lines.append(f"{len(names)} {what}: {shown}")
        return "; ".join(lines)


def find_clips(
    folder: Path,
    unit: tuple[int, int],
    num_frames: int | None = None,
    captions: bool = True,
    least: tuple[int, int] = (1, 1),
) -> Report:
    """Every clip of a folder and its sub-folders, each read whole, and what is wrong with the others.

    unit, least: height and width must be multiples of these, and at least those, in pixels. num_frames: 8N+1, of which
    shorter clips are faults; None takes as many as each clip has. captions: whether each clip must have one. Raises
    DataError for a folder that is missing or without any video.
    """
    if not folder.is_dir():
        raise DataError(f"data is {str(folder)!r}, which is no folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"data is {str(folder)!r}, which holds no video ({', '.join(SUFFIXES)})")
    report = Report()
    for file in files:
        found = _clip(file, unit, num_frames, captions, least)
        if isinstance(found, Clip):
            report.clips.append(found)
        else:
            report.faults.setdefault(found, []).append(str(file.relative_to(folder)))
    return report


def accepted(report: Report, on_fault: str, warn: Callable[[str], None]) -> list[Clip]:
    """The clips to train on. Raises DataError where any has a fault, or with on_fault "skip" where none is left."""
    if report.faults and (on_fault == "stop" or not report.clips):
        more = " (on_fault=skip leaves the faulty ones out)" if report.clips else ""
        raise DataError(f"{report}{more}")
    if report.faults:
        warn(str(report))
    return report.clips


def _clip(
    file: Path, unit: tuple[int, int], num_frames: int | None, captions: bool, least: tuple[int, int]
) -> Clip | str:
    """The clip, or what is wrong with it."""
    caption = ""
    if captions:
        try:
            caption = file.with_suffix(".txt").read_text().strip()
        except (OSError, UnicodeDecodeError):
            return "have no caption in a .txt file beside them"
        if not caption:
            return "have an empty caption"
    try:
        frames, _ = read_video(file)
    except VideoError:
        return "are damaged, cut short, or no video"
    length, height, width = frames.shape[:3]
    used = num_frames or (length - 1) // 8 * 8 + 1
    if length < used:
        return f"have fewer than {used} frames"
    if height % unit[0] or width % unit[1]:
        return f"have a size that is no multiple of {unit[0]} x {unit[1]} pixels"
    if height < least[0] or width < least[1]:
        return f"are smaller than {least[0]} x {least[1]} pixels"
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return Clip(file, caption, digest, used, height, width)
