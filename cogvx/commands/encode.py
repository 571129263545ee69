"""cogvx encode: turn a video into latents."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


def main(
    video: Positional[Path],
    output: Annotated[Path, arg(aliases=["-o"])],
    model: str = "tiny",
    numerics: str = "diffusers",
    device: str | None = None,
) -> None:
    """Encode a video to unscaled latents [1, C, T, H, W] (the posterior's mode), as safetensors.

    Args:
        video: any file that the codecs read; 8N+1 frames, height and width multiples of 8.
        output: the safetensors file to write.
        model: a checkpoint folder, a hub name, or "tiny".
        numerics: whose arithmetic to follow.
        device: unset, a GPU where there is one.
    """
    import torch

    from ..data.pixels import to_tensor
    from ..data.video import check_writable, read_video
    from ..models.checkpoint import save_tensors
    from ..models.vae import CausalVAE
    from ..pipeline import computable, pick_device

    check_writable(output)
    frames, fps = read_video(video)
    vae = computable(CausalVAE.from_pretrained(model, numerics, device=pick_device(device)), None)
    with torch.inference_mode():
        latents = vae.encode(to_tensor(frames).to(next(vae.parameters()))).mode()
    save_tensors({"latents": latents.float().cpu()}, output, {"fps": str(fps), "source": video.name})
    print(f"{output}  latents {list(latents.shape)}")
