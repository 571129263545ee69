"""Longer clips, piece by piece: each goes on where the one before it ends."""

from dataclasses import replace

import numpy as np

from .clip import Clip
from .inputs import Inputs, Video
from .pipeline import Pipeline
from .settings import Configs, Settings, SettingsError, check_int


def extend(
    pipeline: Pipeline,
    video: Video,
    prompt: str,
    num_pieces: int = 1,
    overlap: int | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    progress: bool = True,
    **settings,
) -> Clip:
    """The video and what comes after it, joined without a repeated frame.

    An image-to-video model is shown the last frame. A text-to-video model keeps the last `overlap` frames, 8N+1, as an
    inpainted video does, and so sees how they move; None is half a piece. Each piece has `num_frames`, those that it
    goes on from among them, and piece i has seed + i. The size is the video's own unless it is given. Takes the
    settings of a single call as keywords beside.

    Raises SettingsError, a ValueError, that names an argument that does not fit.
    """
    source = Inputs.read(video=video)
    height = source.video.shape[1] if height is None else height
    width = source.video.shape[2] if width is None else width
    known = Settings(prompt, num_frames=num_frames, height=height, width=width, seed=seed, **settings)
    known = known.resolve(pipeline.configs, pipeline.numerics)
    check_int("num_pieces", num_pieces)
    if num_pieces < 1:
        raise SettingsError(f"num_pieces is {num_pieces}; it must be at least 1")
    overlap = checked_overlap(overlap, known, pipeline.configs, len(source.video))
    whole = replace(known, num_frames=len(source.video), strength=None)
    frames, made, seconds = source.fitted(whole).video, [], 0.0
    for i in range(num_pieces):
        piece = replace(known, seed=known.seed + i).as_dict()
        made.append(pipeline(**piece | going_on(frames, overlap, known, pipeline.configs), progress=progress))
        frames, seconds = np.concatenate([frames, made[-1].frames[overlap:]]), seconds + made[-1].seconds
    fps = source.fps or pipeline.configs.fps
    about = made[0].metadata | {
        "inputs_sha256": source.hashes, "fps": fps, "strength": None,
        "continued": {"num_pieces": num_pieces, "overlap": overlap},
    }  # fmt: skip
    return Clip(frames, fps, about, seconds)


def checked_overlap(overlap: int | None, settings: Settings, configs: Configs, available: int) -> int:
    """How many frames a piece shares with what is before it."""
    if configs.takes_image:
        if overlap not in (None, 1):
            raise SettingsError(f"overlap is {overlap!r}; an image-to-video model goes on from 1 frame, leave it out")
        if settings.num_frames == 1:
            raise SettingsError("num_frames is 1; a piece must have more frames than the one that it goes on from")
        return 1
    step = 2 * configs.time_factor
    counts = range(1, min(settings.num_frames - 1, available) + 1, step)
    if not counts:
        raise SettingsError("num_frames is 1; a piece must have more frames than those that it goes on from")
    if overlap is None:
        return counts[min(settings.num_frames // 2, counts[-1] - 1) // step]
    if isinstance(overlap, bool) or overlap not in counts:
        have = f"pieces have {settings.num_frames} frames and the video {available}"
        raise SettingsError(f"overlap is {overlap!r}; {have}: it must be {step}N+1 from 1 to {counts[-1]}")
    return overlap


def going_on(frames: np.ndarray, overlap: int, settings: Settings, configs: Configs) -> dict:
    """The inputs of a piece: the last frame, or a video of the last frames whose rest is made anew."""
    if configs.takes_image:
        return {"image": frames[-1]}
    rest = np.repeat(frames[-1:], settings.num_frames - overlap, axis=0)
    mask = np.ones((settings.num_frames, 1, 1), bool).repeat(settings.height, 1).repeat(settings.width, 2)
    mask[:overlap] = False
    return {"video": np.concatenate([frames[-overlap:], rest]), "mask": mask, "strength": 1.0}
