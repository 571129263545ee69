"""cogvx replay: make a video again and compare."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ._recorded import Beside


def main(
    file: Annotated[Positional[Path], arg(metavar="FILE")],
    output: Annotated[Path | None, arg(aliases=["-o"])] = None,
    model: str | None = None,
    transformer: Path | None = None,
    vae: Path | None = None,
    lora: tuple[Path, ...] = (),
    image: Path | None = None,
    last_image: Path | None = None,
    video: Path | None = None,
    mask: Path | None = None,
    latents: Path | None = None,
    device: str | None = None,
    progress: bool = True,
) -> None:
    """Make a video again from what it carries, and say whether frames and bytes are equal; status 1 if frames differ.

    Args:
        file: an mp4 that cogvx wrote.
        output: where to write the new video; unset, "-replay" is added to the file's name.
        model: where the checkpoint is now; unset, where it was.
        transformer: where the file is now that was in the place of the checkpoint's; unset, where it was.
        vae: likewise.
        lora: where its LoRAs are now, in any order; those that have not moved may be left out.
        image: the first image that it was made from, where there was one.
        last_image: the last one, likewise.
        video: the video that it was made from, likewise.
        mask: the mask of that, likewise.
        latents: the noise that it was made from, likewise.
        device: unset, a GPU where there is one.
        progress: show a progress bar.
    """
    from ..data.video import check_writable, read_metadata, read_video
    from ..inputs import Inputs
    from ._arguments import check_is_another_file
    from ._recorded import Beside, check_inputs, recorded_pieces, recorded_settings

    made = read_metadata(file)
    output = output or file.with_stem(file.stem + "-replay")
    check_is_another_file(output, file)
    check_writable(output, ".mp4")
    settings = recorded_settings(file, made, model)
    files = {"image": image, "last_image": last_image, "video": video, "mask": mask, "latents": latents}
    check_inputs(file, made, files, Inputs.read(**files))
    continued = recorded_pieces(file, made)
    beside = Beside.found(file, made, {"transformer": transformer, "vae": vae}, lora)

    pipeline = load_again(file, made, model, device, beside)
    if continued is None:
        clip = pipeline(**settings.as_dict(), **files, progress=progress)
    else:
        from ..extend import extend

        clip = extend(pipeline, video, **settings.as_dict(), **continued, progress=progress)
    warn_of_differences(made, clip.metadata)
    # The same weights may have moved.
    clip.metadata.update({name: made[name] for name in ("model", "transformer_file", "vae_file", "loras")
                          if name in made})  # fmt: skip
    clip.save(output)
    before, after = read_video(file)[0], read_video(output)[0]
    same_frames = before.shape == after.shape and bool((before == after).all())
    same_bytes = file.read_bytes() == output.read_bytes()
    words = {True: "equal", False: "DIFFERENT"}
    print(f"{output}: frames {words[same_frames]}, bytes {words[same_bytes]}")
    if not same_frames:
        raise SystemExit(1)


def load_again(file: Path, made: dict, model: str | None, device: str | None, beside: "Beside") -> "Pipeline":
    """The pipeline that a video was made with."""
    from ..parts import load_part
    from ..pipeline import Pipeline
    from ._arguments import torch_dtype
    from ._recorded import recorded_plan, recorded_speed

    plan, speed = recorded_plan(file, made), recorded_speed(file, made)
    dtype, parts = torch_dtype(made["dtype"]), {part: source.path for part, source in beside.parts.items()}
    pipeline = Pipeline.from_pretrained(model or made["model"], dtype, device, made["numerics"], **parts, memory=plan,
                                        speed=speed)  # fmt: skip
    if made.get("vae_dtype", made["dtype"]) != made["dtype"]:
        how = pipeline.configs.vae, torch_dtype(made["vae_dtype"]), pipeline.device
        pipeline.vae = load_part(type(pipeline.vae), pipeline.folder, parts.get("vae"), *how)
        pipeline.vae.tiling = None if plan is None else plan.tiling
    for part, source in beside.parts.items():
        getattr(pipeline, part).file = source  # whose hash is known
    beside.load_loras(file, pipeline.transformer)
    return pipeline


def warn_of_differences(made: dict, now: dict) -> None:
    """Name what has changed since the video was made and may change its pixels."""
    then, today = made["environment"], now["environment"]
    changes = [f"{key} was {then.get(key)}, is {today[key]}" for key in today if then.get(key) != today[key]]
    if made["model_sha256"] != now["model_sha256"]:
        changes.append("the model's weights are not those of then")
    if made.get("batch_size", 1) != 1:
        changes.append(f"it was computed together with {made['batch_size'] - 1} others, now alone")
    if "parallel" in made:
        changes.append(f"several processes shared it ({repr(made['parallel'])[:80]}), now one makes it")
    if changes:
        print(f"cogvx: warning: the frames may differ: {'; '.join(changes)}", file=sys.stderr)
