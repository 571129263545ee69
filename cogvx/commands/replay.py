"""cogvx replay: make a video again and compare."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


def main(
    file: Positional[Path],
    output: Annotated[Path | None, arg(aliases=["-o"])] = None,
    model: str | None = None,
    device: str | None = None,
    progress: bool = True,
) -> None:
    """Make a video again from what it carries, and say whether frames and bytes are equal.

    Args:
        file: an mp4 that cogvx wrote.
        output: where to write the new video; unset, "-replay" is added to the file's name.
        model: where the checkpoint is now; unset, where it was.
        device: unset, a GPU where there is one.
        progress: show a progress bar.
    """
    from ..data.video import check_writable, read_metadata, read_video
    from ..settings import Settings, read_configs

    made = read_metadata(file)
    if made["not_replayable_because_of"]:
        reasons = ", ".join(made["not_replayable_because_of"])
        raise ValueError(f"{file} cannot be replayed: it was made with given {reasons}, which it does not carry")
    output = output or file.with_stem(file.stem + "-replay")
    check_writable(output)
    model = model or made["model"]
    settings = Settings(**{f.name: made[f.name] for f in fields(Settings)}).resolve(read_configs(model))

    from ..pipeline import Pipeline
    from ._arguments import torch_dtype

    pipeline = Pipeline.from_pretrained(model, torch_dtype(made["dtype"]), device, made["numerics"])
    clip = pipeline(**settings.as_dict(), progress=progress)
    warn_of_differences(made, clip.metadata)
    clip.metadata["model"] = made["model"]  # the same weights may have moved
    clip.save(output)
    same_frames = (read_video(file)[0] == read_video(output)[0]).all()
    same_bytes = file.read_bytes() == output.read_bytes()
    words = {True: "equal", False: "DIFFERENT"}
    print(f"{output}: frames {words[bool(same_frames)]}, bytes {words[same_bytes]}")


def warn_of_differences(made: dict, now: dict) -> None:
    """Name what has changed since the video was made and may change its pixels."""
    then, today = made["environment"], now["environment"]
    changes = [f"{key} was {then.get(key)}, is {today[key]}" for key in today if then.get(key) != today[key]]
    if made["model_sha256"] != now["model_sha256"]:
        changes.append("the model's weights are not those of then")
    if changes:
        print(f"cogvx: warning: the frames may differ: {'; '.join(changes)}", file=sys.stderr)
