"""What a ladder found: its rungs as a table, the law with its intervals, and a plot of loss against compute."""

from dataclasses import dataclass
from pathlib import Path

from ..models.on_disk import replacing
from .scaling import SHARE, Law, Rung, fit, interval, resampled

_SHOWN = ("least", "alpha", "beta")


@dataclass(frozen=True)
class Findings:
    """The rungs, the law of all of them, and what was said of the last one before it was trained."""

    rungs: list[Rung]
    law: Law
    between: dict[str, tuple[float, float]]  # of each of the law's numbers
    loss: float  # that was predicted
    interval: tuple[float, float]


def findings(result: dict) -> Findings:
    """Of what `climb` gives or wrote to ladder.json."""
    rungs = [Rung(**rung) for rung in result["rungs"]]
    laws = [law for law, _ in resampled(rungs)]
    names = ("least", "alpha", "beta", "weights_exponent")
    between = {name: interval([getattr(law, name) for law in laws]) for name in names}
    said = result["largest, predicted"]
    return Findings(rungs, fit(rungs), between, said["loss"], tuple(said["interval"]))


def as_markdown(found: Findings) -> str:
    lines = ["| weights | tokens | FLOP | held-out loss | of the law |", "|---:|---:|---:|---:|---:|"]
    for rung in found.rungs:
        law = found.law.loss(rung.weights, rung.tokens)
        lines.append(f"| {rung.weights:,} | {rung.tokens:,} | {rung.flops:.2e} | {rung.loss:.4f} | {law:.4f} |")
    law, last, between = found.law, found.rungs[-1], found.between
    intervals = ", ".join(f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in between.items() if name in _SHOWN)
    (least, most), (low, high) = between["weights_exponent"], found.interval
    within = "inside" if low <= last.loss <= high else "outside"
    return "\n".join([
        *lines,
        "",
        f"loss(N, D) = {law.least:.4f} + {law.a:.4g} / N^{law.alpha:.3f} + {law.b:.4g} / D^{law.beta:.3f}, "
        f"N weights and D tokens; {SHARE:.0%} intervals: {intervals}.",
        f"The best number of weights grows as compute to the power {law.weights_exponent:.2f} "
        f"({least:.2f} to {most:.2f}).",
        f"The last rung was predicted from the others before it was trained: {found.loss:.4f} "
        f"({low:.4f} to {high:.4f}); measured {last.loss:.4f}, {last.loss / found.loss - 1:+.1%}, "
        f"{within} the interval.",
        "",
    ])  # fmt: skip


def plot(found: Findings, file: Path) -> None:
    """Loss against compute, a line for each size; the last rung beside what was predicted of it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for weights in sorted({rung.weights for rung in found.rungs}):
        line = sorted((rung for rung in found.rungs if rung.weights == weights), key=lambda rung: rung.flops)
        flops = [rung.flops for rung in line]
        (points,) = axes.plot(flops, [rung.loss for rung in line], "o", label=f"{weights:,} weights")
        axes.plot(flops, [found.law.loss(r.weights, r.tokens) for r in line], "-", color=points.get_color())
    last, (low, high) = found.rungs[-1], found.interval
    bars = [[found.loss - low], [high - found.loss]]
    axes.errorbar([last.flops], [found.loss], yerr=bars, fmt="_", color="black", capsize=4, label="predicted before")
    axes.set(xscale="log", yscale="log", xlabel="training compute, FLOP", ylabel="held-out loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing(file) as partial:
        figure.savefig(partial, format=file.suffix[1:], dpi=120)
    plt.close(figure)


def write(result: dict, folder: Path) -> str:
    """ladder.md and ladder.png in a folder; the table."""
    found = findings(result)
    plot(found, folder / "ladder.png")
    text = as_markdown(found)
    with replacing(folder / "ladder.md") as partial:
        partial.write_text(text)
    return text
