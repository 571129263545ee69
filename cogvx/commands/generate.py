"""cogvx generate: make a video from a prompt."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ._arguments import Loading, Policies, Sampling, check_is_another_file


def main(
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")],
    output: Annotated[Path, arg(aliases=["-o"])],
    sampling: Annotated[Sampling, arg(name="")],
    loading: Annotated[Loading, arg(name="")],
    policies: Annotated[Policies, arg(name="")],
    image: Path | None = None,
    last_image: Path | None = None,
    video: Path | None = None,
    mask: Path | None = None,
    strength: float = 0.8,
    latents: Path | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    longer: Literal["windows", "riflex"] | None = None,
    parallel: Annotated[str | None, arg(metavar="{auto,NAME=NUMBER[,...]}")] = None,
    progress: bool = True,
) -> None:
    """Make a video from a prompt; also from a video and, with a model that takes them, from images.

    Args:
        prompt: what the video shows.
        output: the mp4 to write.
        sampling: from noise to latents.
        loading: the weights, and how they are computed with.
        policies: what is given up for time.
        image: the first frame, for a model that takes images; scaled to cover the video and cut around the centre.
        last_image: the last frame, likewise.
        video: what to start from, instead of noise alone; as many of its frames are taken as are made.
        mask: an image for all frames or a video, white where the video is made anew; other pixels stay as they are.
        strength: how far the video goes back towards noise first, from above 0 to 1, all the way.
        latents: a safetensors file of the noise to start from, as `cogvx invert` writes it; of its size, if unset.
        num_frames: 8N+1, of CogVideoX 1.5 16N+1; unset, those of latents or, as many as the model makes, of video; else
            what the model was trained on.
        height: in pixels, a multiple of 16; unset, that of latents; else what the model was trained on; so the width.
        width: in pixels, a multiple of 16.
        longer: allows more frames than trained, which the model sees in overlapping windows, or all at once with its
            positions in time stretched as in RIFLEx.
        parallel: how the processes that torchrun starts share the video: how many of them guidance, heads, tokens,
            frames and rows, as in guidance=2,heads=2; unset under torchrun, or auto, finds out.
        progress: show a progress bar.
    """
    from ..inputs import Inputs, planned
    from ..parallel.processes import together
    from ..parallel.ways import AUTO, Limits
    from ..settings import Settings, read_configs

    choices, configs = loading.choices(), read_configs(loading.model)
    size = {"num_frames": num_frames, "height": height, "width": width}
    settings = Settings(prompt, **size, **sampling.settings(), strength=strength, longer=longer)
    files = {"image": image, "last_image": last_image, "video": video, "mask": mask, "latents": latents}
    settings, _ = planned(settings, Inputs.read(**files), configs, choices)
    speed = policies.speed()
    speed.check(settings, 1)
    for file in filter(None, files.values()):
        check_is_another_file(output, file)

    with together(parallel, loading.device) as processes:
        processes.check_writable(output)
        settings = replace(settings, seed=processes.same(settings.seed))
        processes.check_speed(speed)
        # Known before the weights are loaded, as far as the plan for the memory has no say in it.
        processes.ways_for(parallel or AUTO, Limits.of(configs, settings, choices))
        loading = replace(loading, device=processes.device_for(loading.device))
        pipeline = loading.pipeline(settings, speed)
        processes.share(pipeline, parallel or AUTO, settings)
        progress = progress and processes.leads
        made = pipeline.write(output, **settings.as_dict(), **files, progress=progress)
        if processes.leads:
            print(f"{output}  ({made.seconds:.1f} s, seed {made.metadata['seed']})")
