"""cogvx extend: go on where a video ends."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ._arguments import DType


def main(
    video: Annotated[Positional[Path], arg(metavar="VIDEO")],
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")],
    output: Annotated[Path, arg(aliases=["-o"])],
    model: str = "tiny",
    num_pieces: int = 1,
    overlap: int | None = None,
    negative_prompt: str = "",
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: Annotated[str, arg(metavar="SCALE[,SCALE...]")] = "6.0",
    dynamic_guidance: Literal["constant", "wave", "cosine"] | None = None,
    sampler: Literal["ddim", "dpmpp_2m_sde", "dpmpp_2m", "unipc"] | None = None,
    seed: int | None = None,
    ofs: float | None = None,
    numerics: Annotated[str, arg(metavar="{sat,diffusers}[,FIELD=CHOICE...]")] = "sat",
    dtype: DType | None = None,
    device: str | None = None,
    progress: bool = True,
) -> None:
    """Write a video and what comes after it, piece by piece, joined without a repeated frame.

    Args:
        video: any file that the codecs read.
        prompt: what the video shows.
        output: the mp4 to write.
        model: a checkpoint folder, a hub name, or "tiny"; one for images goes on from the last frame alone.
        num_pieces: how many times to go on.
        overlap: how many of the last frames a text-to-video model goes on from, 8N+1; unset, half a piece.
        negative_prompt: what it should not show.
        num_frames: of a piece, those that it goes on from among them; unset, what the checkpoint was trained on.
        height: in pixels; unset, the video's, as for the width.
        width: in pixels.
        num_inference_steps: from 1 to 1000.
        guidance_scale: how closely the prompt is followed; up to 1 is no guidance; or one for each step, as in 6,6,4,1.
        dynamic_guidance: a scale that changes over the steps; unset, what the numerics say.
        sampler: unset, what the numerics and the checkpoint say.
        seed: of the first piece, the next one has the next; unset, a fresh one, which the file keeps.
        ofs: of CogVideoX 1.5's image to video; unset, the 2.0 of training.
        numerics: whose arithmetic to follow, and changes to it.
        dtype: unset, the stored one (fp16 is computed in fp32 on a CPU).
        device: unset, a GPU where there is one.
        progress: show a progress bar.
    """
    from ..data.video import check_writable
    from ..numerics import read_numerics
    from ._arguments import check_is_another_file, read_scales, torch_dtype

    choices, scale = read_numerics(numerics), read_scales(guidance_scale)
    check_is_another_file(output, video)
    check_writable(output, ".mp4")

    from ..extend import extend
    from ..pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(model, torch_dtype(dtype), device, choices)
    clip = extend(
        pipeline, video, prompt, num_pieces, overlap, num_frames, height, width, seed, progress,
        negative_prompt=negative_prompt, num_inference_steps=num_inference_steps, guidance_scale=scale,
        dynamic_guidance=dynamic_guidance, sampler=sampler, ofs=ofs,
    )  # fmt: skip
    clip.save(output)
    print(f"{output}  ({len(clip.frames)} frames, {clip.seconds:.1f} s, seed {clip.metadata['seed']})")
