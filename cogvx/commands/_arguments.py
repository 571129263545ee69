"""What several commands take and make of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from ..models.vae import CausalVAE

DType = Literal["float32", "bfloat16", "float16"]


def torch_dtype(name: str | None) -> "torch.dtype | None":
    """The dtype of that name; None stays None."""
    import torch

    return None if name is None else getattr(torch, name)


def read_scales(text: str) -> float | list[float]:
    """A guidance scale, or one for each step, separated by commas."""
    from ..settings import SettingsError

    try:
        scales = [float(word) for word in text.split(",")]
    except ValueError:
        what = "a number, or one for each step with commas between them"
        raise SettingsError(f"guidance_scale is {text[:60]!r}; it must be {what}") from None
    return scales if len(scales) > 1 else scales[0]


def load_vae(model: str, device: str | None) -> "CausalVAE":
    """The VAE of a checkpoint, ready to compute on the device."""
    from ..machine import computable, pick_device
    from ..models.vae import CausalVAE

    return computable(CausalVAE.from_pretrained(model, device=pick_device(device)), None)


def check_is_another_file(output: Path, source: Path) -> None:
    """Raises VideoError where writing would replace what is read."""
    from ..data.video import VideoError

    if output.resolve() == source.resolve():
        raise VideoError(f"cannot write {output}: it is the file that is read; give another name")
