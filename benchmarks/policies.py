"""The table of docs/speed.md, policy by policy beside the exact pipeline: `PYTHONPATH=. python benchmarks/policies.py`.

The embedded checkpoint makes the same prompts from the same seeds under each policy, in turns. Time is that of the
processor for a clip, decoding included, which other work on the machine does not change; the first clip warms up.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch

from cogvx import Pipeline
from cogvx.eval.generation import evaluation_scenes, judged_clip
from cogvx.eval.reconstruction import psnr
from cogvx.models.step_cache import StepCache
from cogvx.speed import Speed

POLICIES: dict[str, dict] = {
    "exact": {},
    "`weights=\"int8\"`": {"weights": "int8"},
    "`weights=\"fp8\"`": {"weights": "fp8"},
    "`Speed(step_cache=0.3)`": {"speed": Speed(step_cache=0.3)},
    "`Speed(step_cache=0.5)`": {"speed": Speed(step_cache=0.5)},
    "`Speed(step_cache=0.8)`": {"speed": Speed(step_cache=0.8)},
    "`Speed(attention=\"int8\")`": {"speed": Speed(attention="int8")},
    "`Speed(products=\"fp8\")`": {"speed": Speed(products="fp8")},
    "`weights=\"fp8\"`, `Speed(products=\"fp8\")`": {"weights": "fp8", "speed": Speed(products="fp8")},
    "`Speed(compiled=True)`": {"speed": Speed(compiled=True)},
}  # fmt: skip
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
BEGIN, END = "<!-- policies: begin (benchmarks/policies.py) -->", "<!-- policies: end -->"
HEADER = (
    "| policy | steps skipped | time | PSNR to exact, dB: mean, lowest | all right |",
    "|---|---|---|---|---|",
)


class Counted:
    """How many steps every cache has skipped."""

    def __init__(self) -> None:
        self.skipped, asks = 0, StepCache.skips

        def skips(cache: StepCache, reads: torch.Tensor) -> bool:
            answer = asks(cache, reads)
            self.skipped += answer
            return answer

        StepCache.skips = skips


def measured(num_prompts: int, steps: int, log: Path | None) -> dict[str, dict[str, list]]:
    """Of each policy what each prompt gave: seconds, steps skipped, PSNR, whether all of the prompt came out right."""
    pipelines = {name: Pipeline.from_pretrained("tiny", device="cpu", **how) for name, how in POLICIES.items()}
    found = {name: defaultdict(list) for name in POLICIES}
    counted = Counted()
    for i, scene in enumerate(evaluation_scenes(num_prompts)):
        exact = None
        for name, pipeline in pipelines.items():
            before, began = counted.skipped, time.process_time()
            frames = pipeline(scene.prompt, seed=i, num_inference_steps=steps, progress=False).frames
            seconds = time.process_time() - began
            exact = frames if exact is None else exact
            right = judged_clip(frames, scene, i, True)["right"]["all right"]
            near = None if np.array_equal(frames, exact) else psnr(frames, exact)
            for key, value in (("time", seconds), ("skipped", counted.skipped - before), ("psnr", near),
                               ("right", bool(right))):  # fmt: skip
                found[name][key].append(value)
            if log is not None:
                with log.open("a") as file:
                    file.write(f"{i} {name} {seconds:.2f} {counted.skipped - before} {near} {right}\n")
    return found


def table(found: dict[str, dict[str, list]], steps: int) -> list[str]:
    whole = median(found["exact"]["time"][1:])
    lines = []
    for name, figures in found.items():
        near = [value for value in figures["psnr"] if value is not None]
        share, seconds = fmean(figures["skipped"]) / steps, median(figures["time"][1:])
        nearness = f"{fmean(near):.1f}, {min(near):.1f}" if near else "the same"
        right = f"{sum(figures['right'])} of {len(figures['right'])}"
        lines.append(f"| {name} | {share:.0%} | {seconds:.2f} s ({seconds / whole:.2f}) | {nearness} | {right} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--log", type=Path, help="a line for each clip")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = table(measured(given.prompts, given.steps, given.log), given.steps)
    count = f"{given.prompts} prompts, {given.steps} steps, guidance 6"
    how = f"{count}; one thread of a CPU, fp32, torch {torch.__version__}."
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text("\n".join([before + BEGIN, how, "", *HEADER, *lines, END + after]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
