"""The fastest plan that keeps a budget.

The stages of a clip come one after another, and what a stage holds beside the weights of the other parts depends on
how its own part is run alone. So a few fake runs, which between them run every part in every way, say what any
combination holds.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from ..models.tiling import Tiling
from ..settings import Settings
from .plan import PLACES, Plan, PlanError
from .predict import PART, Job, Prediction, Stage, predict

GB = 10**9
LINK = 20 * GB  # bytes a second from pinned memory to a GPU, PCIe 4 x16 as measured on most machines
LIBRARIES = GB  # bytes left to workspaces of libraries, and to what an allocator leaves unused
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": GB, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Choice:
    plan: Plan
    prediction: Prediction

    @property
    def seconds(self) -> float:
        """What the moves of weights take at least, at LINK; streamed blocks may hide it behind their work."""
        return sum(self.prediction.moved.values()) / LINK


def read_budget(text: str) -> int:
    """Bytes of "12GB", "500 MiB" or "8e9". Raises PlanError for what is no amount."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(text), re.IGNORECASE)
    unit = match and UNITS.get(match[2].upper())
    try:
        budget = round(float(match[1]) * unit) if unit else 0
    except (ValueError, OverflowError):
        budget = 0
    if budget < 1:
        raise PlanError(f"memory is {str(text)[:40]!r}; it must be an amount such as 12GB or 7.5GiB")
    return budget


def amount(nbytes: float) -> str:
    """Bytes as `read_budget` takes them, rounded up, so that a plan keeps what is said of it."""
    unit, name = (GB, "GB") if nbytes >= GB else (10**6, "MB")
    return f"{math.ceil(nbytes * 100 / unit) / 100:.2f} {name}"


def plan_for(
    make: Callable[..., Any], memory: Plan | str | None, job: Job, device: torch.device
) -> tuple[Plan, Settings | None]:
    """A plan as it is, or the fastest one for "8GB", or for what is free on the device, "auto"; and for what video.

    None is all that there is. The video is None where the plan is for none. Raises PlanError for what is no amount, for
    a plan with other weights than the job's, and where no plan keeps it.
    """
    if isinstance(memory, Plan):
        if job.weights not in (None, memory.weights):
            raise PlanError(f"weights is {job.weights!r}, those of the plan in memory are {memory.weights!r}; give one")
        return memory, None
    if memory not in (None, "auto"):
        return choose(make, job, read_budget(memory)).plan, job.settings
    if memory is None or device.type != "cuda":
        return Plan(weights=job.weights), None  # one memory for all: nothing is won by moves
    free, _ = torch.cuda.mem_get_info(device)
    return choose(make, job, free - LIBRARIES).plan, job.settings


def warn_of_more(planned: Settings | None, asked: Settings, batch_size: int) -> None:
    """Say that a video may hold more than the one that a plan was made for."""
    if planned is None:
        return
    size, more = (lambda s: f"{s.num_frames} frames of {s.height} x {s.width}"), []
    if asked.num_frames > planned.num_frames or asked.height * asked.width > planned.height * planned.width:
        more.append(f"the video has {size(asked)}, the one planned {size(planned)}")
    if batch_size > 1:
        more.append(f"{batch_size} videos are made at once, one was planned")
    more += ["it is guided"] if asked.is_guided and not planned.is_guided else []
    more += ["it starts from a video"] if asked.strength is not None and planned.strength is None else []
    if more:
        how = "give its settings to from_pretrained as planned_for"
        warnings.warn(f"more memory may be held than was planned: {'; '.join(more)}; {how}", stacklevel=3)


def choose(make: Callable[..., Any], job: Job, budget: int) -> Choice:
    """The fastest plan that keeps a budget, in bytes; weights in 8 bits only where none does without.

    Raises PlanError where none does at all.
    """
    found = []
    for form in (None, job.eight_bits) if job.weights is None else (job.weights,):
        plan = Plan(weights=form)
        whole = predict(make, job, plan)  # the fastest one, which often is enough
        if whole.peak <= budget:
            return Choice(plan, whole)
        found += choices(make, replace(job, weights=form), {plan: whole})
        if any(choice.prediction.peak <= budget for choice in found):
            break
    return fitting(found, budget)


def fitting(found: list[Choice], budget: int) -> Choice:
    """The first of `choices` that keeps a budget. Where none does, PlanError says the least that would, and how."""
    for choice in found:
        if choice.prediction.peak <= budget:
            return choice
    least = min(found, key=lambda choice: choice.prediction.peak)
    what = f"the least that does is {amount(least.prediction.peak)}, with: {least.plan}"
    raise PlanError(f"memory is {amount(budget)}, which no plan keeps for this video; {what}")


def choices(make: Callable[..., Any], job: Job, known: dict[Plan, Prediction] | None = None) -> Iterator[Choice]:
    """Every plan with what it holds, those first that cost less: in what they change, then in bytes moved.

    Weights in 8 bits are the job's alone.
    """
    known = known or {}
    runs = {plan: known.get(plan) or predict(make, job, plan, decodes=decodes) for plan, decodes in samples(job)}
    combined = [Choice(plan, combine(plan, runs)) for plan in plans(job)]
    yield from sorted(combined, key=lambda c: (c.plan.tiling is not None, c.seconds, cost(c.plan)))


def samples(job: Job) -> list[tuple[Plan, bool]]:
    """Plans that between them run every part in every way, and whether they decode."""
    return [(replace(plan, weights=job.weights), decodes) for plan, decodes in _samples(job)]


def _samples(job: Job) -> list[tuple[Plan, bool]]:
    guided, tiled = job.settings.is_guided, tiling(job)
    found = [
        (Plan(), True),
        (Plan("visiting", "visiting", "visiting", guided, True), True),
        (Plan("streamed", "streamed", "visiting", guided, True, tiled), True),
    ]
    if not guided:
        return found
    crossed = Plan("visiting", "visiting", "visiting", False, True), Plan(sequential_guidance=True)
    return [
        *found,
        *((plan, False) for plan in (*crossed, Plan("streamed", "streamed", "visiting", False, True, tiled))),
    ]


def tiling(job: Job) -> Tiling:
    """About four tiles of a frame, that share a quarter of their size."""
    height, width = (max(16, -(-size * 5 // 8 // 8) * 8) for size in (job.settings.height, job.settings.width))
    return Tiling("blend", height, width, max(8, min(height, width) // 4 // 8 * 8))


def plans(job: Job) -> Iterator[Plan]:
    decodes = ((False, None), (True, None), (True, tiling(job)))
    places = product(PLACES, PLACES, PLACES[:2])
    for (text, transformer, vae), sequential, (halos, tiles) in product(places, (False, True), decodes):
        yield Plan(text, transformer, vae, sequential and job.settings.is_guided, halos, tiles, job.weights)


def cost(plan: Plan) -> int:
    """Among plans that move the same weights: halos on the host cost more than guidance in two passes."""
    return 2 * plan.halos_on_host + plan.sequential_guidance


def combine(plan: Plan, runs: dict[Plan, Prediction]) -> Prediction:
    """What a plan holds, from runs in which each part works as it does in the plan."""
    weights, stages, moved = next(iter(runs.values())).weights, {}, {}
    for stage, part in PART.items():
        usable = [(p, r) for p, r in runs.items() if stage in r.stages and works_alike(stage, p, plan)]
        other, run = usable[0]
        found = run.stages[stage]
        for name, nbytes in weights.items():
            there, here = (getattr(p, name) == "resident" for p in (other, plan))
            if name != part and there != here:
                found += Stage(nbytes, -nbytes) * (1 if here else -1)
            elif name == part and there != here:  # at work all of it is there, in the host's memory only if it visits
                found += Stage(0, -nbytes) * (1 if here else -1)
        stages[stage] = found
    for name in weights:
        if getattr(plan, name) != "resident":
            moved[name] = next(r.moved[name] for p, r in runs.items() if moves_alike(name, p, plan))
    return Prediction(stages, weights, moved)


def works_alike(stage: str, one: Plan, other: Plan) -> bool:
    """Whether the part that works in a stage does so in the same way."""
    part = PART[stage]
    if part == "vae":
        return (one.halos_on_host, one.tiling) == (other.halos_on_host, other.tiling)
    # While sampling, a visiting transformer has let the weights go that modulate; a resident one holds them.
    if stage == "sample" and getattr(one, part) != getattr(other, part):
        return False
    streamed = (getattr(one, part) == "streamed") == (getattr(other, part) == "streamed")
    return streamed and (part == "text_encoder" or one.sequential_guidance == other.sequential_guidance)


def moves_alike(part: str, one: Plan, other: Plan) -> bool:
    same = getattr(one, part) == getattr(other, part)
    twice = part == "transformer" and getattr(one, part) == "streamed"
    return same and (not twice or one.sequential_guidance == other.sequential_guidance)
