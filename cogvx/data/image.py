"""Still images: reading them, and fitting images and videos into another size.

Images are uint8 [H, W, 3] in RGB, videos [T, H, W, 3].
"""

import os
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 2**26


class ImageError(ValueError):
    """An image file that cannot be read; the message names the file and says why."""


def read_image(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image file's pixels, upright as its metadata say.

    Raises: ImageError for a file that is missing, damaged, of another kind, or of more than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked before it is decoded
            with Image.open(path, formats=READABLE_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    size = f"{image.width} x {image.height}"
                    raise ImageError(f"{path} is too large: {size} are more than {max_pixels} pixels")
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is damaged, or no {', '.join(READABLE_FORMATS)} image") from error
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror or error}") from error
    except (Image.DecompressionBombError, SyntaxError, ValueError, IndexError, EOFError, MemoryError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path} is damaged: {str(error)[:100]}") from error


def fitted(
    frames: np.ndarray,  # [T, H, W, 3] or, of a mask, [T, H, W]
    height: int,
    width: int,
) -> np.ndarray:
    """Frames of another size: scaled until they cover it, and cut to it around their centre.

    Images are resampled by Lanczos; of masks, bool, the nearest pixel is taken.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    scale = max(height / frames.shape[1], width / frames.shape[2])
    size = [max(least, round(side * scale)) for side, least in zip(frames.shape[1:3], (height, width), strict=True)]
    top, left = ((large - small) // 2 for large, small in zip(size, (height, width), strict=True))
    how = Image.Resampling.NEAREST if frames.dtype == bool else Image.Resampling.LANCZOS
    resized = [np.asarray(Image.fromarray(frame).resize(size[::-1], how)) for frame in frames]
    return np.stack(resized)[:, top : top + height, left : left + width]
