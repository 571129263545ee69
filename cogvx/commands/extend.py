"""cogvx extend: go on where a video ends."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ._arguments import Loading, Policies, Sampling


def main(
    video: Annotated[Positional[Path], arg(metavar="VIDEO")],
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")],
    output: Annotated[Path, arg(aliases=["-o"])],
    sampling: Annotated[Sampling, arg(name="")],
    loading: Annotated[Loading, arg(name="")],
    policies: Annotated[Policies, arg(name="")],
    num_pieces: int = 1,
    overlap: int | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
) -> None:
    """Write a video and what comes after it, piece by piece, joined without a repeated frame.

    Args:
        video: any file that the codecs read.
        prompt: what the video shows.
        output: the mp4 to write.
        sampling: from noise to latents.
        loading: the weights, and how they are computed with.
        policies: what is given up for time.
        num_pieces: how many times to go on; each piece has a seed one above that of the piece before it.
        overlap: how many of the last frames a text-to-video model goes on from, 8N+1; unset, half a piece. A model for
            images goes on from the last frame alone.
        num_frames: of a piece, those that it goes on from among them: 8N+1, of CogVideoX 1.5 16N+1; unset, what the
            model was trained on.
        height: in pixels, a multiple of 16; unset, the video's, as for the width.
        width: in pixels, a multiple of 16.
        progress: show a progress bar.
    """
    from ..data.video import check_writable
    from ._arguments import check_is_another_file

    loading.choices()
    settings, speed = sampling.settings(), policies.speed()
    check_is_another_file(output, video)
    check_writable(output, ".mp4")

    from ..extend import extend

    pipeline = loading.pipeline(speed=speed)
    size = {"num_frames": num_frames, "height": height, "width": width}
    clip = extend(pipeline, video, prompt, num_pieces, overlap, **size, **settings, progress=progress)
    clip.save(output)
    print(f"{output}  ({len(clip.frames)} frames, {clip.seconds:.1f} s, seed {clip.metadata['seed']})")
