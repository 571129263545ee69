"""cogvx replay: make a video again and compare."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

from tyro.conf import Positional, arg

from ._arguments import DType

if TYPE_CHECKING:
    from ..settings import Settings

SINCE = ("strength", "ofs", "longer")  # settings that older videos do not carry; those were made without


def main(
    file: Annotated[Positional[Path], arg(metavar="FILE")],
    output: Annotated[Path | None, arg(aliases=["-o"])] = None,
    model: str | None = None,
    image: Path | None = None,
    last_image: Path | None = None,
    video: Path | None = None,
    mask: Path | None = None,
    device: str | None = None,
    progress: bool = True,
) -> None:
    """Make a video again from what it carries, and say whether frames and bytes are equal; status 1 if frames differ.

    Args:
        file: an mp4 that cogvx wrote.
        output: where to write the new video; unset, "-replay" is added to the file's name.
        model: where the checkpoint is now; unset, where it was.
        image: the first image that it was made from, where there was one.
        last_image: the last one, likewise.
        video: the video that it was made from, likewise.
        mask: the mask of that, likewise.
        device: unset, a GPU where there is one.
        progress: show a progress bar.
    """
    from ..data.video import check_writable, read_metadata, read_video
    from ._arguments import check_is_another_file, torch_dtype

    made = read_metadata(file)
    output = output or file.with_stem(file.stem + "-replay")
    check_is_another_file(output, file)
    check_writable(output, ".mp4")
    settings = recorded_settings(file, made, model)
    files = {"image": image, "last_image": last_image, "video": video, "mask": mask}
    check_inputs(file, made, files)
    continued = recorded_pieces(file, made)

    from ..pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(model or made["model"], torch_dtype(made["dtype"]), device, made["numerics"])
    if continued is None:
        clip = pipeline(**settings.as_dict(), **files, progress=progress)
    else:
        from ..extend import extend

        clip = extend(pipeline, video, **settings.as_dict(), **continued, progress=progress)
    warn_of_differences(made, clip.metadata)
    clip.metadata["model"] = made["model"]  # the same weights may have moved
    clip.save(output)
    before, after = read_video(file)[0], read_video(output)[0]
    same_frames = before.shape == after.shape and bool((before == after).all())
    same_bytes = file.read_bytes() == output.read_bytes()
    words = {True: "equal", False: "DIFFERENT"}
    print(f"{output}: frames {words[same_frames]}, bytes {words[same_bytes]}")
    if not same_frames:
        raise SystemExit(1)


def recorded_settings(file: Path, made: dict, model: str | None) -> "Settings":
    """The settings that a video carries, complete. Raises VideoError for a video that cannot be made again."""
    from ..data.video import VideoError
    from ..numerics import NumericsError, read_numerics
    from ..settings import Settings, SettingsError, read_configs

    if made.get("not_replayable_because_of"):
        reasons = ", ".join(map(str, made["not_replayable_because_of"]))
        raise VideoError(f"{file} cannot be replayed: it was made with given {reasons}, which it does not carry")
    names = [f.name for f in fields(Settings) if f.name not in SINCE]
    missing = [n for n in (*names, "model", "dtype", "numerics", "model_sha256", "environment") if n not in made]
    if missing:
        raise VideoError(f"{file} cannot be replayed: its metadata does not say {', '.join(missing)}")
    kinds = {"model": str, "model_sha256": str, "environment": dict, "seed": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(made[name], kind)]
    wrong += [] if made["dtype"] in get_args(DType) else ["dtype"]
    if wrong:
        raise VideoError(f"{file} cannot be replayed: in its metadata {wrong[0]} is {str(made[wrong[0]])[:60]!r}")
    try:
        numerics = read_numerics(made["numerics"])
    except NumericsError as error:
        raise VideoError(f"{file} cannot be replayed: in its metadata {error}") from error
    try:
        settings = Settings(**{name: made[name] for name in (*names, *SINCE) if name in made})
        return settings.resolve(read_configs(model or made["model"]), numerics)
    except SettingsError as error:
        raise VideoError(f"{file} cannot be replayed with this model: {error}") from error


def recorded_pieces(file: Path, made: dict) -> dict[str, int] | None:
    """How an extended video was made, None for one that was not. Raises VideoError for metadata that do not say it."""
    from ..data.video import VideoError

    pieces = made.get("continued")
    if pieces is None:
        return None
    if not isinstance(pieces, dict) or set(pieces) != {"num_pieces", "overlap"} or "video" not in made["inputs_sha256"]:
        raise VideoError(f"{file} cannot be replayed: in its metadata continued is {str(pieces)[:60]!r}")
    return pieces


def check_inputs(file: Path, made: dict, files: dict[str, Path | None]) -> None:
    """Raises VideoError unless exactly the inputs are given, by their pixels, that a video was made from."""
    from ..data.video import VideoError
    from ..inputs import Inputs

    then, now = made.get("inputs_sha256", {}), Inputs.read(**files).hashes
    if not isinstance(then, dict):
        raise VideoError(f"{file} cannot be replayed: in its metadata inputs_sha256 is {str(then)[:60]!r}")
    for name in {**then, **now}:
        option = "--" + name.replace("_", "-")
        if name not in now:
            raise VideoError(f"{file} was made from {name}; give it with {option}")
        if name not in then:
            raise VideoError(f"{file} was made without {name}; leave {option} out")
        if then[name] != now[name]:
            raise VideoError(f"{name} is {files[name]}, whose pixels are not those that {file} was made from")


def warn_of_differences(made: dict, now: dict) -> None:
    """Name what has changed since the video was made and may change its pixels."""
    then, today = made["environment"], now["environment"]
    changes = [f"{key} was {then.get(key)}, is {today[key]}" for key in today if then.get(key) != today[key]]
    if made["model_sha256"] != now["model_sha256"]:
        changes.append("the model's weights are not those of then")
    if made.get("batch_size", 1) != 1:
        changes.append(f"it was computed together with {made['batch_size'] - 1} others, now alone")
    if changes:
        print(f"cogvx: warning: the frames may differ: {'; '.join(changes)}", file=sys.stderr)
