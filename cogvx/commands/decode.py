"""cogvx decode: turn latents into a video."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..config import VAEConfig

FPS = 8  # of latents that do not say what they were encoded from


def main(
    latents: Annotated[Positional[Path], arg(metavar="LATENTS")],
    output: Annotated[Path, arg(aliases=["-o"])],
    model: str = "tiny",
    numerics: Annotated[str, arg(metavar="{sat,diffusers}[,FIELD=CHOICE...]")] = "sat",
    device: str | None = None,
) -> None:
    """Decode unscaled latents [1, C, T, H, W] from a safetensors file, as `cogvx encode` writes it.

    Args:
        latents: the safetensors file; its one tensor is named "latents".
        output: the mp4 to write.
        model: a checkpoint folder, a hub name, or "tiny".
        numerics: whose arithmetic to follow, and changes to it.
        device: unset, a GPU where there is one.
    """
    from ..config import VAEConfig
    from ..data.video import check_writable
    from ..models.checkpoint import component_folder, load_tensors, read_config, resolve_folder
    from ..numerics import read_numerics

    choices = read_numerics(numerics)
    check_writable(output, ".mp4")
    root = resolve_folder(model)
    config = read_config(VAEConfig, component_folder(root, "vae"), root)
    tensors, metadata = load_tensors(latents)
    z = check_latents(latents, tensors, config)

    import torch

    from ..data.pixels import to_frames
    from ..data.video import write_video
    from ..finite import check_finite
    from ..models.choices import decode_chunks, first_alone
    from ._arguments import load_vae

    vae = load_vae(model, device)
    z, shapes = z.to(next(vae.parameters())), []
    plan = decode_chunks(z.shape[2], choices), first_alone(z.shape[2], choices)
    # Where the first latent of an odd count gives as many frames as the others, the last 4k + 1 are the clip.
    surplus = 3 if z.shape[2] % 2 and not plan[1] else 0

    def frames() -> Iterator["np.ndarray"]:
        for number, video in enumerate(vae.decode_each(z, *plan)):
            check_finite(video, "decoding", vae, lambda: vae.decode(z, *plan))
            video = video if number else video[:, :, surplus:]
            shapes.append(video.shape[2:])
            yield to_frames(video)[0]

    with torch.inference_mode():
        write_video(output, frames(), stated_rate(metadata), {"not_replayable_because_of": ["latents"]})
    print(f"{output}  {sum(shape[0] for shape in shapes)} frames of {shapes[0][2]} x {shapes[0][1]}")


def check_latents(file: Path, tensors: "dict[str, Tensor]", config: "VAEConfig") -> "Tensor":
    """The latents in a file's tensors. Raises CheckpointError for what the VAE cannot take."""
    from ..finite import all_finite
    from ..models import CheckpointError

    found = {name: list(t.shape) for name, t in tensors.items()}
    shape = found.get("latents", [])
    fits = len(found) == 1 and len(shape) == 5 and shape[:2] == [1, config.latent_channels] and 0 not in shape
    if not fits or not tensors["latents"].is_floating_point():
        wanted = f"[1, {config.latent_channels}, T, H, W]"
        raise CheckpointError(f"{file} holds {found}; it must hold one tensor of numbers, 'latents' of shape {wanted}")
    if not all_finite(tensors["latents"]):
        raise CheckpointError(f"{file} holds latents that are not finite; they must be finite numbers alone")
    return tensors["latents"]


def stated_rate(metadata: dict[str, str]) -> float:
    """The frame rate that the latents' file states, in frames a second."""
    try:
        fps = float(metadata.get("fps", FPS))
    except ValueError:
        return FPS
    if not 0.01 <= fps <= 1000:
        return FPS
    return int(fps) if fps.is_integer() else fps
