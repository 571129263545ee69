"""What a video is made from beside words: images, a video and a mask, as pixels, and noise."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .clip import Clip
from .data.image import READABLE_FORMATS, fitted, read_image
from .data.video import read_video
from .finite import all_finite
from .models.checkpoint import load_tensors
from .numerics import Numerics
from .settings import Configs, Settings, SettingsError

Picture = str | os.PathLike | np.ndarray | Image.Image  # a file, uint8 [H, W, 3], or Pillow's
Video = str | os.PathLike | np.ndarray | Clip  # a file, uint8 [T, H, W, 3], or a clip that was made
Noise = str | os.PathLike | Tensor  # a safetensors file as `cogvx invert` writes it, or [1, C, T, H, W]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HALF = 128  # a mask's pixels from this level on are made anew


@dataclass(frozen=True, eq=False)
class Inputs:
    """The pixels, and the noise, that a call was given; None for what it was not."""

    image: np.ndarray | None = None  # uint8 [H, W, 3], the first frame
    last_image: np.ndarray | None = None  # uint8 [H, W, 3], the last frame
    video: np.ndarray | None = None  # uint8 [T, H, W, 3], what to start from
    mask: np.ndarray | None = None  # bool [1 or T, H, W], where to make it anew
    latents: Tensor | None = None  # [1, C, T, H, W], the noise to start from, in the place of what would be drawn
    fps: float | None = None  # of the video, where it has one
    hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 of each one's shape and values, as they were given

    @classmethod
    def read(
        cls,
        image: Picture | None = None,
        last_image: Picture | None = None,
        video: Video | None = None,
        mask: Picture | Video | None = None,
        latents: Noise | None = None,
    ) -> Self:
        """Files, arrays and clips as pixels, and noise; raises SettingsError, ImageError, VideoError or CheckpointError
        for what is none."""
        frames, fps = (None, None) if video is None else _frames("video", video)
        read = {
            "image": None if image is None else _picture("image", image),
            "last_image": None if last_image is None else _picture("last_image", last_image),
            "video": frames,
            "mask": None if mask is None else _mask(mask),
            "latents": None if latents is None else _noise(latents),
        }
        return cls(**read, fps=fps, hashes={name: _hash(x) for name, x in read.items() if x is not None})

    def pasted(self, frames: np.ndarray, start: int = 0) -> np.ndarray:  # [T, H, W, 3]
        """Frames, the first of which is frame `start` of the video, with the video's own pixels outside of the mask."""
        if self.mask is None:
            return frames
        here = slice(start, start + len(frames))
        return np.where(self.mask[here if len(self.mask) > 1 else slice(None), ..., None], frames, self.video[here])

    def check(self, configs: Configs) -> None:
        """Raises SettingsError for inputs that this model cannot take, or that miss each other."""
        if self.mask is not None and self.video is None:
            raise SettingsError("mask is given without video; give the video that it is a mask of")
        if configs.takes_image:
            if self.image is None and self.video is None:
                raise SettingsError("image is None; this is an image-to-video model: give the first frame as image")
        else:
            for name in ("image", "last_image"):
                if getattr(self, name) is not None:
                    what = f"this model has {configs.transformer.in_channels} input channels, none of them for images"
                    raise SettingsError(f"{name} is given, but {what}; use an image-to-video model, such as 5b-i2v")

    def fitted(self, settings: Settings) -> Self:
        """The inputs at the size of the video that is made; scaled to cover it and cut around the centre.

        Raises SettingsError for a video with too few frames to have a last image, or to be started from.
        """
        size, count = (settings.height, settings.width), settings.num_frames
        if self.last_image is not None and count == 1:
            raise SettingsError("last_image is given for a video of 1 frame, which is the first already")
        changed = {}
        for name in ("image", "last_image"):
            if (picture := getattr(self, name)) is not None:
                changed[name] = fitted(picture[None], *size)[0]
        if self.video is not None:
            if len(self.video) < count:
                raise SettingsError(f"num_frames is {count}, but video has {len(self.video)} frames; ask for fewer")
            changed["video"] = fitted(self.video[:count], *size)
        if self.mask is not None:
            if len(self.mask) != 1 and len(self.mask) != len(self.video):
                what = f"it must have 1, or the {len(self.video)} of video"
                raise SettingsError(f"mask has {len(self.mask)} frames; {what}")
            changed["mask"] = fitted(self.mask[:count], *size)
            if not changed["mask"].any():
                raise SettingsError("mask is black where the video is made, so nothing would change; it must be white "
                                    "where the video is to be made anew")  # fmt: skip
        return replace(self, **changed)

    def sized(self, settings: Settings, configs: Configs) -> Settings:
        """The settings, those of the size that are unset being what the noise says."""
        if self.latents is None:
            return settings
        filling = (configs.transformer.patch_size_t or 1) - 1  # latent frames that only fill up a patch in time
        num_latents, height, width = self.latents.shape[2:]
        size = {
            "num_frames": max(num_latents - filling - 1, 0) * configs.time_factor + 1,
            "height": height * configs.space_factor,
            "width": width * configs.space_factor,
        }
        return replace(settings, **{name: n for name, n in size.items() if getattr(settings, name) is None})


NAMES = ("image", "last_image", "video", "mask", "latents")


def planned(settings: Settings, inputs: Inputs, configs: Configs, numerics: Numerics) -> tuple[Settings, Inputs]:
    """Settings complete, and inputs at the size that they say.

    Raises SettingsError for any that do not fit the model, or each other.
    """
    inputs.check(configs)
    settings = inputs.sized(settings, configs)
    if inputs.video is None:
        settings = replace(settings, strength=None)
    elif settings.strength is None:
        raise SettingsError("strength is None; with a video it must be a number above 0, up to 1")
    elif settings.num_frames is None:
        counts = settings.frame_counts(configs)
        settings = replace(settings, num_frames=counts[(min(len(inputs.video), counts[-1]) - 1) // counts.step])
    settings = settings.resolve(configs, numerics)
    inputs = inputs.fitted(settings)
    if inputs.latents is not None:
        checked("latents", inputs.latents, (1, *settings.latent_shape(configs)))
    if configs.takes_image and inputs.image is None:
        inputs = replace(inputs, image=inputs.video[0])
    return settings, inputs


def _picture(name: str, value: Picture) -> np.ndarray:
    if isinstance(value, str | os.PathLike):
        return read_image(value)
    if isinstance(value, Image.Image):
        value = np.array(value.convert("RGB"))
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
        raise SettingsError(f"{name} is {_kind(value)}; it must be a file, a Pillow image or uint8 [H, W, 3]")
    return _not_empty(name, value)


def _frames(name: str, value: Video) -> tuple[np.ndarray, float | None]:
    if isinstance(value, str | os.PathLike):
        return read_video(value)
    if isinstance(value, Clip):
        return value.frames, value.fps
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 4 or value.shape[3] != 3:
        raise SettingsError(f"{name} is {_kind(value)}; it must be a file, a Clip or uint8 [T, H, W, 3]")
    return _not_empty(name, value), None


def _mask(value: Picture | Video) -> np.ndarray:
    """A mask from an image or a video, white where the video is made anew, or from an array of bool."""
    if isinstance(value, np.ndarray) and value.dtype == bool and value.ndim in (2, 3):
        return _not_empty("mask", value if value.ndim == 3 else value[None])
    if isinstance(value, str | os.PathLike):
        is_image = Path(value).suffix.lower() in IMAGE_SUFFIXES
        levels = read_image(value)[None] if is_image else read_video(value)[0]
    elif isinstance(value, Image.Image):
        levels = _picture("mask", value)[None]
    elif isinstance(value, Clip):
        levels = value.frames
    else:
        what = f"an image ({', '.join(READABLE_FORMATS)}) or a video, or an array of bool [H, W] or [T, H, W]"
        raise SettingsError(f"mask is {_kind(value)}; it must be {what}")
    return levels.mean(axis=-1) >= HALF


def _noise(value: Noise) -> Tensor:
    if isinstance(value, str | os.PathLike):
        tensors, _ = load_tensors(value)
        if list(tensors) != ["latents"]:
            what = f"tensors named {', '.join(map(repr, tensors))[:200] or 'nothing'}"
            raise SettingsError(f"latents is {value}, which holds {what}; it must hold one, 'latents' [1, C, T, H, W]")
        value = tensors["latents"]
    if not isinstance(value, Tensor) or value.dim() != 5 or not value.is_floating_point():
        what = "a safetensors file or a tensor of numbers [1, C, T, H, W]"
        raise SettingsError(f"latents is {_kind(value)}; it must be {what}")
    return value


def checked(name: str, value: object, shape: Sequence[int]) -> Tensor:
    """`value`, if it is a tensor of that shape with finite values. Raises SettingsError otherwise."""
    if not isinstance(value, Tensor):
        raise SettingsError(f"{name} is of type {type(value).__name__}; it must be a tensor")
    if tuple(value.shape) != tuple(shape):
        raise SettingsError(f"{name} has shape {list(value.shape)}; here it must be {list(shape)}")
    if not all_finite(value):
        raise SettingsError(f"{name} holds values that are not finite; it must hold finite numbers alone")
    return value


def _hash(value: np.ndarray | Tensor) -> str:
    head = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}\n".encode()
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).hexdigest()


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray | Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"of type {type(value).__name__}"


def _not_empty(name: str, value: np.ndarray) -> np.ndarray:
    if 0 in value.shape:
        raise SettingsError(f"{name} is {_kind(value)}; it must not be empty")
    return np.require(value, requirements=["C", "W"])  # torch warns of memory that must not be written
