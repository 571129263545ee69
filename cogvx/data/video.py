"""Video files: the only module that touches a codec.

Frames are uint8 [T, H, W, 3] in RGB. What is written depends on the frames, the rate and the metadata alone: pixels
are converted bit-exactly and x264 runs in one thread, because both otherwise depend on how the work was shared out.
"""

import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image

TAG = "cogvx"  # of the mp4's metadata, a JSON object
MAX_PIXELS = 2**29  # of a video that is read, all frames together: 1.5 GiB of RGB
READABLE_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"
READABLE_CODECS = {"h264", "hevc", "mpeg4", "ffv1", "vp8", "vp9", "av1", "libvpx", "libvpx-vp9", "libdav1d"}

# Colour is halved by averaging and doubled by repeating, so that frames survive being read and written again.
EXACT = (
    Interpolation.BITEXACT | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
TO_YUV, TO_RGB = Interpolation.AREA | EXACT, Interpolation.POINT | EXACT
# crf 14 cannot be told from the source by eye; a short key frame distance keeps seeking quick; chromaloc 1 says that
# the averaged colour lies in the centre of its four pixels; mbtree makes other bytes of the same frames at times, even
# in one thread.
X264 = {"preset": "medium", "crf": "14", "g": "24", "threads": "1", "x264-params": "chromaloc=1:mbtree=0"}
_UNFINISHED: set[Path] = set()  # files that are being written


class VideoError(ValueError):
    """A video file that cannot be read or written; the message names the file and says why."""


def write_video(
    path: str | os.PathLike,
    frames: np.ndarray | Iterable[np.ndarray],  # uint8 [T, H, W, 3], or parts of it one after another
    fps: float | Fraction,
    metadata: dict | None = None,
) -> None:
    """Write frames as an H.264 mp4 (yuv420p) of exactly their size, with the metadata inside.

    Parts are encoded as they come, none is kept. The file appears whole or not at all, also on Ctrl-C and where the
    parts end in an error.

    Raises: ValueError for frames or rates that H.264 cannot hold, VideoError where the file cannot be written.
    """
    rate = _check_rate(fps)
    parts = _checked_parts(frames)
    tag = json.dumps({} if metadata is None else metadata, allow_nan=False)
    try:
        with _replacing(path) as temporary:
            options = {"movflags": "use_metadata_tags+faststart"}
            with av.open(str(temporary), "w", format="mp4", container_options=options) as container:
                container.metadata[TAG] = tag
                _encode(container, parts, rate)
    except OSError as error:
        raise VideoError(f"cannot write {path}: {error.strerror or error}") from error


def read_video(
    path: str | os.PathLike, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, float]:  # frames uint8 [T, H, W, 3], frames a second
    """Read every frame of a video file, and its rate (an int where it is whole).

    Raises: VideoError for a file that is missing, damaged, cut short, of another kind, or of more than `max_pixels`.
    """
    with _reading(path) as container:
        stream = _video_stream(path, container)
        rate = stream.average_rate or stream.base_rate
        if not rate or rate <= 0:
            raise VideoError(f"{path} does not state a frame rate")
        frames, hidden, end = _decode(path, container, stream, max_pixels)
        if not frames or _is_short(container, stream, len(frames), hidden, end):
            of = f" of {stream.frames}" if stream.frames else ""
            raise VideoError(f"{path} is cut short or damaged: only {len(frames)}{of} frames can be read")
        return np.stack(frames), int(rate) if rate.denominator == 1 else float(rate)


def read_metadata(path: str | os.PathLike) -> dict:
    """What `write_video` was given as metadata.

    Raises: VideoError for a file that cannot be read as a video, or that `write_video` did not write.
    """
    with _reading(path) as container:
        _video_stream(path, container)
        tag = container.metadata.get(TAG)
    if tag is None:
        raise VideoError(f"{path} was not made by cogvx: it carries no {TAG!r} metadata")
    try:
        metadata = json.loads(tag)
    except (ValueError, RecursionError) as error:
        raise VideoError(f"the {TAG!r} metadata of {path} is damaged") from error
    if not isinstance(metadata, dict):
        raise VideoError(f"the {TAG!r} metadata of {path} is damaged")
    return metadata


def write_contact_sheet(
    path: str | os.PathLike,
    frames: np.ndarray,  # uint8 [T, H, W, 3]
    count: int = 8,
) -> None:
    """Write a PNG with `count` frames in a row, evenly spaced from the first to the last.

    Raises: ValueError for wrong frames or counts, VideoError where the file cannot be written.
    """
    _check_layout(frames)
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    picked = frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
    height, width = frames.shape[1:3]
    zoom = 160 / max(height, width)
    zoom, method = (int(zoom), Image.Resampling.NEAREST) if zoom >= 1 else (zoom, Image.Resampling.LANCZOS)
    tile, gap = (max(1, round(width * zoom)), max(1, round(height * zoom))), 4
    sheet = Image.new("RGB", ((tile[0] + gap) * len(picked) - gap, tile[1]), "white")
    for i, frame in enumerate(picked):
        sheet.paste(Image.fromarray(frame).resize(tile, method), ((tile[0] + gap) * i, 0))
    try:
        with _replacing(path) as temporary:
            sheet.save(temporary, format="PNG")
    except OSError as error:
        raise VideoError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(path: str | os.PathLike, suffix: str | None = None) -> None:
    """Find out before the work whether a file can be written there, and that it ends in `suffix`.

    Raises: VideoError that says why not.
    """
    target = Path(os.path.realpath(path))
    if suffix is not None and target.suffix.lower() != suffix:
        raise VideoError(f"cannot write {path}: the name must end in {suffix}, such as {Path(path).stem}{suffix}")
    if target.exists() and not target.is_file():
        raise VideoError(f"cannot write {path}: it is {'a folder' if target.is_dir() else 'no ordinary file'}")
    if not target.parent.is_dir():
        raise VideoError(f"cannot write {path}: there is no folder {target.parent}")
    temporary = _beside(target)
    try:
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        raise VideoError(f"cannot write {path}: {error.strerror}") from error


def _check_layout(frames: np.ndarray) -> None:
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        got = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise ValueError(f"frames must be a uint8 array [T, H, W, 3], not {got}")
    if 0 in frames.shape:
        raise ValueError(f"frames must not be empty, but they are {list(frames.shape)}")


def _check_rate(fps: float | Fraction) -> Fraction:
    if not (math.isfinite(fps) and 0.01 <= fps <= 1000):
        raise ValueError(f"fps must be from 0.01 to 1000, not {fps}")
    return Fraction(fps).limit_denominator(1001)


def _checked_parts(frames: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The parts of a clip; the first one is checked at once, the others as they come."""
    parts = iter([frames] if isinstance(frames, np.ndarray) or not isinstance(frames, Iterable) else frames)
    first = next(parts, None)
    if first is None:
        raise ValueError("frames must not be empty, but no part of them came")
    _check_frames(first)

    def others() -> Iterator[np.ndarray]:
        for part in parts:
            _check_layout(part)
            if part.shape[1:] != first.shape[1:]:
                raise ValueError(f"frames must keep their size {first.shape[1:3]}, not become {part.shape[1:3]}")
            yield part

    return chain([first], others())


def _check_frames(frames: np.ndarray) -> None:
    _check_layout(frames)
    for name, size in zip(("height", "width"), frames.shape[1:3], strict=True):
        if size % 2:
            raise ValueError(f"{name} of the frames must be even for H.264, not {size}; nearest: {size + 1}")
        if size > 16384:
            raise ValueError(f"{name} of the frames must be at most 16384, not {size}")


def _encode(container: av.container.OutputContainer, parts: Iterator[np.ndarray], rate: Fraction) -> None:
    stream = container.add_stream("libx264", rate=rate, options=X264)
    part = next(parts)
    stream.height, stream.width = part.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.colorspace = Colorspace.SMPTE170M
    stream.codec_context.color_range = ColorRange.MPEG
    for i, rgb in enumerate(frame for part in chain([part], parts) for frame in part):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.SMPTE170M, interpolation=TO_YUV, threads=1
        )
        frame.pts, frame.time_base = i, 1 / rate
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _decode(
    path: str | os.PathLike,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    max_pixels: int,
) -> tuple[list[np.ndarray], int, float]:
    """Every frame, how many of the stored ones the file itself says not to show, and when the last one ends."""
    codec = stream.codec_context
    codec.thread_count = 1
    codec.options = {"err_detect": "crccheck+bitstream+buffer+explode", "max_pixels": str(max_pixels)}
    _check_size(path, codec.width, codec.height, stream.frames, max_pixels)
    frames: list[np.ndarray] = []
    hidden, end = 0, 0.0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise VideoError(f"{path} is cut short or damaged after frame {len(frames)}")
        hidden += packet.is_discard
        for frame in packet.decode():
            _check_size(path, frame.width, frame.height, len(frames) + 1, max_pixels)
            rgb = _to_rgb(frame)
            if frames and rgb.shape != frames[0].shape:
                raise VideoError(f"{path} changes its size at frame {len(frames)}, which is not supported")
            frames.append(rgb)
            end = (frame.time or 0.0) + float((frame.duration or 0) * frame.time_base)
    return frames, hidden, end


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame as uint8 [H, W, 3], bit-exactly, by the matrix and range that the file names."""
    if frame.format.name in ("yuv420p", "yuvj420p") and frame.width % 2 == frame.height % 2 == 0:
        # A copy without the place of the colour samples, so that each is repeated over its own four pixels: the
        # conversion would shift them by half a pixel in files that name no place, nearly all.
        plain = av.VideoFrame.from_ndarray(frame.to_ndarray(), format=frame.format.name)
        plain.colorspace, plain.color_range = frame.colorspace, frame.color_range
        frame = plain
    return frame.reformat(format="rgb24", interpolation=TO_RGB, threads=1).to_ndarray()


def _check_size(path: str | os.PathLike, width: int, height: int, count: int, max_pixels: int) -> None:
    if width * height * max(count, 1) > max_pixels:
        raise VideoError(
            f"{path} is too large: {max(count, 1)} frames of {width} x {height} are more than {max_pixels} pixels"
        )


def _is_short(
    container: av.container.InputContainer, stream: av.VideoStream, shown: int, hidden: int, end: float
) -> bool:
    """Whether the file says that there is more than the frames shown, which end after `end` seconds."""
    if stream.frames and not hidden:
        return shown < stream.frames
    rate = stream.average_rate or stream.base_rate
    seconds = _stated_seconds(container, stream)
    if seconds is None:
        return False
    if stream.frames:  # an mp4 whose edit list hides frames: those shown fill its duration
        return shown < seconds * rate - 0.5
    return end < seconds - 0.5 / rate  # Matroska counts no frames, but says when the last one ends


def _matroska_is_cut(file: BinaryIO) -> bool:
    """Whether a Matroska file ends before its segment, the element after the header that holds everything, does."""
    position = file.seek(0, os.SEEK_CUR)
    file.seek(0)
    head = file.read(256)
    file.seek(position)  # where the demuxer left it

    def number(at: int) -> tuple[int | None, int]:  # a size, None where it was left open, and where it ends
        width = 9 - head[at].bit_length()
        value = int.from_bytes(head[at : at + width], "big") & (limit := (1 << 7 * width) - 1)
        return (None if value == limit else value), at + width

    try:
        header, at = number(4)
        at += header or 0
        size, start = number(at + 4)
    except IndexError:
        return False
    is_segment = head[at : at + 4] == b"\x18\x53\x80\x67"
    return is_segment and size is not None and os.fstat(file.fileno()).st_size < start + size


def _stated_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """How long the file says that its video is: infinitely where it ought to say so and does not, None if unknown."""
    match = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
    if match:
        hours, minutes, seconds = match.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if len(container.streams) > 1:
        return None  # another stream may last longer
    if container.duration:
        return container.duration / av.time_base
    return math.inf if stream.frames else None


@contextmanager
def _reading(path: str | os.PathLike) -> Iterator[av.container.InputContainer]:
    """An open video file; whatever goes wrong with it is a VideoError."""
    try:
        options = {"format_whitelist": READABLE_FORMATS}
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise VideoError(f"{path} is empty")
            with av.open(file, container_options=options, metadata_errors="replace") as container:
                if container.format.name.startswith("matroska") and _matroska_is_cut(file):
                    raise VideoError(f"{path} is cut short: the file ends before its content does")
                yield container
    except av.FFmpegError as error:
        raise VideoError(f"{path} is damaged, or no mp4, mov, mkv or webm video: {error.strerror}") from error
    except OSError as error:
        raise VideoError(f"cannot read {path}: {error.strerror}") from error


def _video_stream(path: str | os.PathLike, container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise VideoError(f"{path} holds no video")
    stream = container.streams.video[0]
    codec = stream.codec_context.name if stream.codec_context else "unknown"
    if codec not in READABLE_CODECS:
        raise VideoError(f"{path} is coded as {codec}, which is not supported; use H.264, HEVC, VP9 or AV1")
    return stream


@contextmanager
def _replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path` for a file that takes its place at the end, or goes if anything is raised."""
    target = Path(os.path.realpath(path))
    temporary = _beside(target)
    _UNFINISHED.add(temporary)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        _UNFINISHED.discard(temporary)


def remove_unfinished() -> None:
    """Remove what is being written, before a process is ended in the middle of it."""
    for temporary in list(_UNFINISHED):
        temporary.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    return target.with_name(f".cogvx-{secrets.token_hex(8)}.tmp")
