"""One evaluation of a checkpoint of Shapes World: its table in Markdown, and the same figures as JSON."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from ..data.video import check_writable
from ..machine import environment
from ..models.on_disk import replacing
from ..pipeline import Pipeline
from ..settings import Settings, SettingsError
from .generation import GROUPS, MOST_OFF, Adherence, Share, evaluate_prompts
from .reconstruction import Reconstruction, evaluate_reconstruction

# What the embedded checkpoints are held to.
LEAST_SHARE = {"colour": 0.95, "background": 0.95, "motion": 0.90, "shape": 0.90, "all right": 0.95}
LEAST_KEPT = {"kept": 0.90}  # of a model that takes images
LEAST_PSNR = 30.0  # dB


@dataclass(frozen=True)
class Report:
    """What an evaluation found, and how it was made."""

    settings: dict
    adherence: Adherence | None
    reconstruction: Reconstruction | None
    seconds: float

    @property
    def reached(self) -> bool:
        """Whether every measured figure is at least what is asked."""
        shares = {} if self.adherence is None else self.adherence["all"]
        return all(shares[word].value >= least for word, least in _least(shares).items() if word in shares) and (
            self.reconstruction is None or self.reconstruction.mean >= LEAST_PSNR
        )

    def __str__(self) -> str:
        """The figures as a table in Markdown."""
        how, lines = self.settings, []
        if self.adherence is not None:
            judged = "after H.264" if how["compress"] else "on raw frames"
            lines += [
                f"{how['num_prompts']} prompts, {how['steps']} steps, guidance {how['guidance_scale']:g}, seed "
                f"{how['seed']}; judged {judged}; share right, with its 95 % interval (Wilson).",
                *_about_images(self.adherence["all"]),
                "",
                "| | " + " | ".join(f"{group} ({_count(self.adherence, group)})" for group in GROUPS) + " | at least |",
                "|---|" + "---|" * (len(GROUPS) + 1),
                *(_row(self.adherence, word) for word in self.adherence["all"]),
                "",
            ]
        if self.reconstruction is not None:
            mean, least = self.reconstruction.mean, min(self.reconstruction.psnr)
            lines += [
                f"VAE over {how['num_clips']} held-out clips (mode of the posterior, rounded to uint8): mean PSNR "
                f"{mean:.2f} dB, lowest {least:.2f} dB; at least {LEAST_PSNR:.0f} dB on average.",
                "",
            ]
        return "\n".join(lines)

    def as_dict(self) -> dict:
        """The figures as plain numbers, lists and dicts."""
        adherence = self.adherence and {
            group: {word: _figures(share) for word, share in shares.items()} for group, shares in self.adherence.items()
        }
        psnr = self.reconstruction and {"mean": self.reconstruction.mean, "clips": list(self.reconstruction.psnr)}
        return {
            "settings": self.settings, "reached": self.reached, "adherence": adherence, "psnr_db": psnr,
            "seconds": round(self.seconds, 1),
        }  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write evaluation.json and evaluation.md, each whole or not at all."""
        for name, text in (("json", json.dumps(self.as_dict(), indent=1) + "\n"), ("md", str(self))):
            with replacing(folder / f"evaluation.{name}") as partial:
                partial.write_text(text)


def evaluate(
    model: str = "tiny",
    num_prompts: int = 480,
    num_clips: int = 96,
    seed: int = 0,
    steps: int = 50,
    output: Path | None = None,
    guidance_scale: float = 6.0,
    batch_size: int = 16,
    compress: bool = True,
    progress: bool = True,
    numerics: str = "sat",
) -> Report:
    """Measure a Shapes World checkpoint: how its clips obey prompts, and how its VAE rebuilds held-out clips.

    0 prompts or 0 clips leave that part out. `output` is a folder for evaluation.md, evaluation.json and clips.jsonl,
    a line for each judged clip, from which a stopped evaluation goes on.

    Raises:
        SettingsError: for an argument that is out of range, before the model is loaded.
    """
    _check(num_prompts, num_clips, steps, batch_size, output)
    started = time.perf_counter()
    pipeline = Pipeline.from_pretrained(model, numerics=numerics)
    about = {"model": model, "model_sha256": pipeline.model_hash, "dtype": str(pipeline.dtype).removeprefix("torch.")}
    how = Settings(None).resolve(pipeline.configs, pipeline.numerics)
    about |= {"numerics": pipeline.numerics.as_dict(), "sampler": how.sampler, "dynamic_guidance": how.dynamic_guidance}
    about |= {"environment": environment(pipeline.device)}
    adherence = reconstruction = None
    if num_clips:
        reconstruction = evaluate_reconstruction(pipeline.vae, num_clips, seed)
    if num_prompts:
        log = None if output is None else output / "clips.jsonl"
        adherence = evaluate_prompts(
            pipeline, num_prompts, seed, steps=steps, guidance_scale=guidance_scale, batch_size=batch_size,
            compress=compress, log=log, about=about, progress=progress,
        )  # fmt: skip
    settings = {
        **about, "num_prompts": num_prompts, "num_clips": num_clips, "seed": seed, "steps": steps,
        "guidance_scale": guidance_scale, "compress": compress,
    }  # fmt: skip
    report = Report(settings, adherence, reconstruction, time.perf_counter() - started)
    if output is not None:
        report.save(output)
    return report


def _check(num_prompts: int, num_clips: int, steps: int, batch_size: int, output: Path | None) -> None:
    if num_prompts < 0 or num_prompts % 2:
        nearest = max(0, num_prompts - 1)
        raise SettingsError(f"num_prompts is {num_prompts}, which is not 0 or an even number; nearest: {nearest}")
    for name, value, least in (("num_clips", num_clips, 0), ("steps", steps, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise SettingsError(f"{name} is {value}, which is less than {least}")
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            check_writable(output / "evaluation.json")
        except OSError as error:
            reason = f"which cannot be made a folder: {error.strerror}"
            raise SettingsError(f"output is {str(output)!r}, {reason}") from error


def _figures(share: Share) -> dict:
    if not share.judged:
        return {"right": 0, "judged": 0, "share": None, "interval_95": None}
    return {"right": share.right, "judged": share.judged, "share": share.value, "interval_95": list(share.interval)}


def _least(shares: dict[str, Share]) -> dict[str, float]:
    return LEAST_KEPT if "kept" in shares else LEAST_SHARE


def _about_images(shares: dict[str, Share]) -> list[str]:
    if "kept" not in shares:
        return []
    where = f"at most {MOST_OFF:g} of 64 pixels from there"
    return [f"Each is given the first frame of a rendered clip; kept: the figure's colour, shape and place ({where})."]


def _count(adherence: Adherence, group: str) -> int:
    return adherence[group]["colour"].judged


def _row(adherence: Adherence, word: str) -> str:
    cells = [_cell(adherence[group][word]) for group in GROUPS]
    wanted = _least(adherence["all"])
    least = f"{100 * wanted[word]:.0f} %" if word in wanted else ""
    return f"| {word} | " + " | ".join([*cells, least]) + " |"


def _cell(share: Share) -> str:
    if not share.judged:
        return "not judged"
    low, high = share.interval
    return f"{100 * share.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
