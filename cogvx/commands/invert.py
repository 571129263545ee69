"""cogvx invert: find the noise that a video is made from."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ._arguments import Loading


def main(
    video: Annotated[Positional[Path], arg(metavar="VIDEO")],
    output: Annotated[Path, arg(aliases=["-o"])],
    loading: Annotated[Loading, arg(name="")],
    prompt: str = "",
    image: Path | None = None,
    last_image: Path | None = None,
    negative_prompt: str = "",
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    seed: int = 0,
    ofs: float | None = None,
    refinements: int = 0,
    reconstruct: Path | None = None,
    progress: bool = True,
) -> None:
    """Write the noise that DDIM makes a video from, as safetensors, latents [1, C, T, H, W]; and make it again.

    Args:
        video: any file that the codecs read; as many of its frames are taken as the model makes.
        output: the safetensors file to write.
        loading: the weights, and how they are computed with.
        prompt: what the video shows; empty, as the model sees it unprompted.
        image: the first frame, for a model that takes images; unset, the video's.
        last_image: the last frame, likewise; unset, none.
        negative_prompt: what it does not show, with guidance.
        num_frames: 8N+1, of CogVideoX 1.5 16N+1; unset, as many of the video's as the model makes.
        height: in pixels, a multiple of 16; unset, what the model was trained on, as for the width.
        width: in pixels, a multiple of 16.
        num_inference_steps: the more, the nearer the reconstruction.
        guidance_scale: above 1 takes the reconstruction away from the video.
        seed: of the images' latents, for a model that takes images.
        ofs: of CogVideoX 1.5's image to video; unset, the 2.0 of training.
        refinements: further calls of the model in each step, which make the noise more exact.
        reconstruct: an mp4 to write, made of the noise again.
        progress: show a progress bar.
    """
    from ..data.video import check_writable
    from ..settings import read_configs
    from ._arguments import check_is_another_file

    check_writable(output, ".safetensors")
    if reconstruct is not None:
        check_is_another_file(reconstruct, video)
        check_writable(reconstruct, ".mp4")
    loading.choices()
    read_configs(loading.model)

    import json

    from ..invert import invert, psnr
    from ..invert import reconstruct as remake
    from ..models.checkpoint import save_tensors

    pipeline = loading.pipeline()
    found = invert(
        pipeline, video, prompt, image, last_image, negative_prompt, num_frames, height, width, num_inference_steps,
        guidance_scale, seed, ofs, refinements, progress,
    )  # fmt: skip
    about = {"source": video.name, "settings": json.dumps(found.settings.as_dict())}
    save_tensors({"latents": found.latents.cpu()}, output, about)
    print(f"{output}  latents {list(found.latents.shape)}")
    if reconstruct is not None:
        clip = remake(pipeline, found, progress)
        clip.save(reconstruct)
        print(f"{reconstruct}  PSNR {psnr(clip, found):.2f} dB")
