"""How well generated Shapes World clips obey their prompts, by the judge, with 95 % intervals.

A model that takes images is given the first frame of a rendered clip beside its prompt, and must keep the figure: its
colour, its shape and its place.

Half of the prompts are combinations that were held out of training. Each clip is written to an mp4 and read back
before it is judged, because that is what a user sees; `compress=False` judges the raw frames.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import dist, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.shapes import COLOURS, FPS, HELD_OUT_SCENES, SIZES, TRAINING_SCENES, Scene, is_held_out, parse, render
from ..data.video import read_video, write_video
from ..models.on_disk import replacing
from ..pipeline import Pipeline
from ..settings import SettingsError
from .shapes import Palette, compare, read_clip

WORDS = ("colour", "background", "motion", "shape", "size", "all right")
IMAGE_WORDS = ("colour", "shape", "place", "kept", "motion")  # kept: the three before it
MOST_OFF = 2.0  # pixels of 64 between the figure's centres in the given first frame and in the made one
GROUPS = ("seen", "held out", "all")
Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Share:
    """So many right, of so many judged."""

    right: int
    judged: int

    @property
    def value(self) -> float:
        return self.right / self.judged if self.judged else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson: (c ± z sqrt(p (1 - p) / n + z² / 4 n²)) / (1 + z² / n), c = p + z² / 2 n."""
        if not self.judged:
            return 0.0, 1.0
        n, p = self.judged, self.value
        centre, half = p + Z95**2 / (2 * n), Z95 * sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        low, high = ((centre + sign * half) / (1 + Z95**2 / n) for sign in (-1, 1))
        return (low if self.right else 0.0), (high if self.right < n else 1.0)  # exact where rounding is not


Adherence = dict[str, dict[str, Share]]  # of each of GROUPS, of each of WORDS, or of IMAGE_WORDS


def evaluate_prompts(pipeline: Pipeline, num_prompts: int = 480, seed: int = 0, **how: Any) -> Adherence:
    """The shares of prompts that the pipeline's clips obey, word by word; `how` as of `judge_scenes`.

    Raises:
        ValueError: for counts below 1, an odd number of prompts, or a log of other settings.
    """
    records = judge_scenes(pipeline, evaluation_scenes(num_prompts, seed), seed, **how)
    return adherence(records, IMAGE_WORDS if pipeline.configs.takes_image else WORDS)


def judge_scenes(
    pipeline: Pipeline,
    scenes: list[Scene],
    seed: int = 0,
    steps: int = 50,
    guidance_scale: float = 6.0,
    batch_size: int = 16,
    compress: bool = True,
    log: Path | None = None,
    about: dict | None = None,
    progress: bool = True,
    palette: Palette = COLOURS,
) -> list[dict]:
    """A record of every scene: what the clip of its prompt shows, and which words are right.

    Clip i is what seed + i gives, and the judge knows the colours of `palette`. With `log`, each judged clip becomes a
    line of JSON there; a run that was stopped goes on from a log of the same prompts and settings, to which `about`
    adds what the caller knows of the model.

    Raises:
        ValueError: for a batch_size below 1, or a log of other prompts or settings.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, which is less than 1")
    settings = {
        **(about or {}), "num_prompts": len(scenes), "seed": seed, "steps": steps, "guidance_scale": guidance_scale,
        "compress": compress, **({} if palette == COLOURS else {"palette": {n: list(c) for n, c in palette.items()}}),
    }  # fmt: skip
    records = [] if log is None else resume_log(log, settings)
    if [record["prompt"] for record in records] != [scene.prompt for scene in scenes[: len(records)]]:
        raise SettingsError(f"log is {str(log)!r}, which is of other prompts; name another file")
    with tqdm(total=len(scenes), initial=len(records), unit="clip", disable=not progress) as bar:
        while len(records) < len(scenes):
            start = len(records)
            how = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "progress": False}
            if pipeline.configs.takes_image:  # one by one, as each has an image of its own
                given = given_clip(scenes[start], seed, start)
                clip = pipeline(scenes[start].prompt, image=given[0], seed=seed + start, **how)
                new = [judged_image_clip(clip.frames, given, scenes[start], start, compress, palette)]
            else:
                some = scenes[start : start + batch_size]
                clips = pipeline.batch([s.prompt for s in some], seed=seed + start, batch_size=batch_size, **how)
                pairs = enumerate(zip(clips, some, strict=True))
                new = [judged_clip(clip.frames, scene, start + i, compress, palette) for i, (clip, scene) in pairs]
            records += new
            bar.update(len(new))
            if log is not None:
                with log.open("a") as file:
                    file.writelines(json.dumps(record) + "\n" for record in new)
    return records


def evaluation_scenes(num_prompts: int, seed: int = 0) -> list[Scene]:
    """The prompts' scenes: held-out and trained combinations in turn, each half as even in its words as can be."""
    if num_prompts < 2 or num_prompts % 2:
        raise ValueError(f"num_prompts is {num_prompts}, which is not an even number of at least 2")
    rng = np.random.default_rng(seed)
    halves = [_balanced(scenes, num_prompts // 2, rng) for scenes in (HELD_OUT_SCENES, TRAINING_SCENES)]
    return [scene for pair in zip(*halves, strict=True) for scene in pair]


def judged_clip(frames: np.ndarray, scene: Scene, index: int, compress: bool, palette: Palette = COLOURS) -> dict:
    """One line of the log: the prompt, what was read off the clip, and which words are right."""
    reading = read_clip(compressed(frames) if compress else frames, palette)
    verdict = compare(reading, scene)
    right = {**asdict(verdict), "all right": verdict.all_right}
    return {"clip": index, "prompt": scene.prompt, "right": right, "reading": asdict(reading)}


def judged_image_clip(
    frames: np.ndarray, given: np.ndarray, scene: Scene, index: int, compress: bool, palette: Palette = COLOURS
) -> dict:
    """One line of the log for a clip of a model that was shown the first frame of `given`, a rendered clip."""
    wanted, reading = read_clip(given).start, read_clip(compressed(frames) if compress else frames, palette)
    right = {
        "colour": reading.colour == scene.colour,
        "shape": reading.shape == scene.shape,
        "place": reading.start is not None and dist(reading.start, wanted) <= MOST_OFF,
    }
    right |= {"kept": all(right.values()), "motion": reading.motion == scene.motion}
    return {"clip": index, "prompt": scene.prompt, "right": right, "given": wanted, "reading": asdict(reading)}


def given_clip(scene: Scene, seed: int, index: int) -> np.ndarray:
    """The rendered clip whose first frame a model is shown, uint8 [17, 64, 64, 3]; training has other seeds."""
    return render(scene, np.random.default_rng((seed, index, 1)))


def compressed(frames: np.ndarray) -> np.ndarray:
    """The frames, uint8 [T, H, W, 3], as a user's mp4 shows them."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, frames, FPS)
        return read_video(file)[0]


def adherence(records: list[dict], words: tuple[str, ...] = WORDS) -> Adherence:
    """The shares of right words over judged clips: combinations seen in training, held out, and both."""
    held_out = [is_held_out(parse(record["prompt"])) for record in records]
    of_group = {
        "seen": [record for record, unseen in zip(records, held_out, strict=True) if not unseen],
        "held out": [record for record, unseen in zip(records, held_out, strict=True) if unseen],
        "all": records,
    }
    return {group: {word: share(of_group[group], word) for word in words} for group in GROUPS}


def resume_log(log: Path, settings: dict) -> list[dict]:
    """What a log of these settings holds already, without a torn last line; a log that is not there is begun."""
    if not log.exists() or not log.stat().st_size:
        log.write_text(json.dumps(settings) + "\n")
        return []
    whole, _, _ = log.read_text().rpartition("\n")
    lines = list(_json_lines(whole, log))
    if lines[:1] != [settings]:
        raise SettingsError(
            f"log is {str(log)!r}, which is of other settings than {json.dumps(settings)}; name another file"
        )
    with replacing(log) as partial:
        partial.write_text(whole + "\n")
    return lines[1:]


def _json_lines(text: str, log: Path) -> Iterator[dict]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise SettingsError(f"log is {str(log)!r}, whose line {number} is not JSON") from error


def share(records: list[dict], word: str) -> Share:
    """Of the clips in which a word is judged, those in which it is right."""
    judged = [record["right"][word] for record in records if record["right"][word] is not None]
    return Share(sum(judged), len(judged))


def _balanced(scenes: tuple[Scene, ...], count: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes with sizes, drawn one by one: the combination used least, in the size used least, its words said least."""
    sized = [replace(scene, size=size) for scene in scenes for size in SIZES]
    combination = np.arange(len(sized)) // len(SIZES)
    columns = []
    for field in ("colour", "shape", "motion", "background", "size"):
        words = np.array([getattr(scene, field) for scene in sized])
        # Weighed by how many words the field has, since each of many comes up more rarely.
        columns += [(words == word) * np.sqrt(len(np.unique(words))) for word in np.unique(words)]
    says = np.stack(columns, 1)  # [scenes with sizes, words of all fields]
    used, drawn = np.zeros(len(sized)), []
    for _ in range(count):
        said = says @ (used @ says)
        combined = np.bincount(combination, used)[combination]
        chosen = np.lexsort((rng.random(len(sized)), said.round(6), used, combined))[0]
        used[chosen] += 1
        drawn.append(sized[chosen])
    return drawn
