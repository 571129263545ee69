"""The README's table of plans, five models at five budgets: `PYTHONPATH=. python benchmarks/plans.py`.

Every figure is predicted, as by `cogvx plan`; a model's plans take minutes of one core. Words after the command
are models; the rows of the others stay.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cogvx import Pipeline
from cogvx.commands.plan import read_job
from cogvx.memory.choose import GB, Choice, amount, choices, fitting
from cogvx.memory.plan import PlanError
from cogvx.memory.predict import Job

MODELS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
BUDGETS = (24, 16, 12, 8, 5)  # GB
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- plans: begin (benchmarks/plans.py) -->", "<!-- plans: end -->"
ABOUT = (
    "What `cogvx plan` predicts for the models at their own sizes, 50 steps with guidance, of the device's memory; a",
    "move is counted at 20 GB/s and as if none were hidden. Nothing here was measured on a GPU. Tiles, and weights in",
    "int8, change the frames and are chosen where nothing else keeps the budget: [docs/memory.md](docs/memory.md).",
    "",
)
HEADER = ("| model | budget | text encoder, transformer, VAE | and | peak | moves |", "|---|---|---|---|---|---|")


def job_of(model: str) -> Job:
    return read_job(model, None, None, None, 50, 6.0, "sat", None)


def rows(model: str) -> Iterator[str]:
    """The plans of a model's own size of video, 50 steps, guided; weights in int8 only where no others fit."""
    job, known = job_of(model), {}

    def among(form: str | None, budget: int) -> Choice | None:
        known.setdefault(form, []) or known[form].extend(choices(Pipeline, replace(job, weights=form)))
        try:
            return fitting(known[form], budget * GB)
        except PlanError:
            return None

    for budget in BUDGETS:
        choice = among(None, budget) or among("int8", budget)
        yield row(model, budget, choice) if choice else f"| {model} | {budget} GB | no plan keeps it | | | |"
    yield from (least(model, form, known[form]) for form in known)


def least(model: str, form: str | None, found: list[Choice]) -> str:
    lowest = min(found, key=lambda choice: choice.prediction.peak)
    return row(model, 0, lowest).replace("| 0 GB |", f"| least{f', {form}' if form else ''} |")


def row(model: str, budget: int, choice: Choice) -> str:
    parts = str(choice.plan).split("; ")
    where, more = ", ".join(part.split()[-1] for part in parts[:3]), "; ".join(parts[3:])
    moves = f"{choice.seconds:.1f} s" if choice.seconds else "none"
    return f"| {model} | {budget} GB | {where} | {more} | {amount(choice.prediction.peak)} | {moves} |"


def written(readme: str, made: dict[str, list[str]]) -> str:
    """The README with new rows for some models."""
    before, _, rest = readme.partition(BEGIN)
    inside, _, after = rest.partition(END)
    old = [line for line in inside.splitlines() if line.startswith("| ") and line not in HEADER]
    lines = [line for m in MODELS for line in made.get(m, [line for line in old if line.startswith(f"| {m} |")])]
    return "\n".join([before + BEGIN, *(ABOUT + HEADER if lines else ()), *lines, END + after])


def main(models: list[str]) -> None:
    for model in models or MODELS:
        found = {model: list(rows(model))}
        README.write_text(written(README.read_text(), found))
        print("\n".join(found[model]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
