"""cogvx encode: turn a video into latents."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from ..config import VAEConfig


def main(
    video: Annotated[Positional[Path], arg(metavar="VIDEO")],
    output: Annotated[Path, arg(aliases=["-o"])],
    model: str = "tiny",
    numerics: Annotated[str, arg(metavar="{sat,diffusers}[,FIELD=CHOICE...]")] = "sat",
    device: str | None = None,
) -> None:
    """Encode a video to unscaled latents [1, C, T, H, W] (the posterior's mode), as safetensors.

    Args:
        video: any file that the codecs read; 8N+1 frames, height and width multiples of 8.
        output: the safetensors file to write.
        model: a checkpoint folder, a hub name, or "tiny".
        numerics: whose arithmetic to follow, and changes to it.
        device: unset, a GPU where there is one.
    """
    from ..config import VAEConfig
    from ..data.video import check_writable, read_video
    from ..models.checkpoint import component_folder, read_config, resolve_folder, save_tensors
    from ..numerics import read_numerics

    choices = read_numerics(numerics)
    check_writable(output, ".safetensors")
    root = resolve_folder(model)
    config = read_config(VAEConfig, component_folder(root, "vae"), root)
    frames, fps = read_video(video)
    check_frames(video, frames.shape, config)

    import torch

    from ..data.pixels import to_tensor
    from ..finite import check_finite
    from ..models.choices import encode_chunks
    from ._arguments import load_vae

    vae = load_vae(model, device)
    x = to_tensor(frames).to(next(vae.parameters()))
    with torch.inference_mode():
        chunks = encode_chunks(len(frames), choices)
        latents = vae.encode(x, chunks).mode()
        check_finite(latents, "encoding", vae, lambda: vae.encode(x, chunks))
    save_tensors({"latents": latents.float().cpu()}, output, {"fps": str(fps), "source": video.name})
    print(f"{output}  latents {list(latents.shape)}")


def check_frames(file: Path, shape: tuple[int, ...], config: "VAEConfig") -> None:
    """Raises VideoError for a video [T, H, W, 3] that the VAE cannot take."""
    from ..data.video import VideoError

    chunk, unit = 2 * config.temporal_compression_ratio, 2 ** (len(config.block_out_channels) - 1)
    num_frames, height, width = shape[:3]
    if num_frames % chunk != 1:
        nearest = max(1, round((num_frames - 1) / chunk) * chunk + 1)
        raise VideoError(f"{file} has {num_frames} frames; it must have {chunk}N+1, the nearest is {nearest}")
    for name, size in (("height", height), ("width", width)):
        if size % unit:
            nearest = max(unit, round(size / unit) * unit)
            raise VideoError(f"{file} has {name} {size}; it must be a multiple of {unit}, the nearest is {nearest}")
