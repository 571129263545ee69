"""cogvx decode: turn latents into a video."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


def main(
    latents: Positional[Path],
    output: Annotated[Path, arg(aliases=["-o"])],
    model: str = "tiny",
    numerics: str = "diffusers",
    device: str | None = None,
) -> None:
    """Decode unscaled latents [1, C, T, H, W] from a safetensors file, as `cogvx encode` writes it.

    Args:
        latents: the safetensors file; its one tensor is named "latents".
        output: the mp4 to write.
        model: a checkpoint folder, a hub name, or "tiny".
        numerics: whose arithmetic to follow.
        device: unset, a GPU where there is one.
    """
    import torch

    from ..clip import Clip
    from ..data.pixels import to_frames
    from ..data.video import check_writable
    from ..finite import check_finite
    from ..models.checkpoint import load_tensors
    from ..models.vae import CausalVAE
    from ..pipeline import computable, pick_device

    check_writable(output)
    tensors, metadata = load_tensors(latents)
    if list(tensors) != ["latents"] or tensors["latents"].dim() != 5 or len(tensors["latents"]) != 1:
        found = {name: list(t.shape) for name, t in tensors.items()}
        raise ValueError(f"{latents} holds {found}; it must hold one tensor 'latents' of shape [1, C, T, H, W]")
    vae = computable(CausalVAE.from_pretrained(model, numerics, device=pick_device(device)), None)
    z = tensors["latents"].to(next(vae.parameters()))
    with torch.inference_mode():
        video = vae.decode(z)
        check_finite(video, "decoding", vae.decoder, z, {})
    clip = Clip(to_frames(video)[0], round(float(metadata.get("fps", 8))), {"source": latents.name})
    clip.save(output)
    print(f"{output}  {len(clip.frames)} frames of {clip.frames.shape[2]} x {clip.frames.shape[1]}")
