"""The README's part about GPUs, made from results: `python -m gpu.readme` writes it anew (PYTHONPATH=benchmarks:.)."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cogvx_kernels._op import OPS

from . import record, table

ROOT = Path(__file__).resolve().parents[2]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN = "<!-- GPU results: begin (benchmarks/gpu/readme.py) -->\n"
END = "<!-- GPU results: end -->"
NONE = "No run of `benchmarks/gpu.sh` on a GPU is recorded here: what the kernels do on one was not measured."


def main() -> None:
    README.write_text(with_results(README.read_text(), RESULTS))


def with_results(text: str, folder: Path) -> str:
    """The README with what a folder of results says between its two marks."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + "\n".join(lines(folder)) + "\n" + END + after


def lines(folder: Path) -> Iterator[str]:
    """Our fastest kernel of each operator and pass beside the fastest of all others that were there."""
    stages = folder / "stages.json"
    if not stages.exists() or json.loads(stages.read_text())["dry_run"]:
        yield NONE
        return
    yield table.title(record.read(folder / "machine.json") or {})
    yield ""
    yield "| operator | case | pass | ours | ms | share of floor | fastest other | ms |"
    yield "|---|---|---|---|---|---|---|---|"
    found = record.read(folder / "operators.json") or {"rows": []}
    for key, rows in _groups(found["rows"], ("operator", "case", "pass")):
        ours = [row for row in rows if row["by"] in OPS[row["operator"]].backends]
        others = [row for row in rows if row not in ours]
        yield "| " + " | ".join([*key, *_fastest(ours, share=True), *_fastest(others)]) + " |"
    yield ""
    yield "| model | ours, ms | share of floor | fastest other | ms |"
    yield "|---|---|---|---|---|"
    found = record.read(folder / "models.json") or {"rows": []}
    for (what,), rows in _groups(found["rows"], ("what",)):
        ours = [row for row in rows if row["by"] == "ours"]
        others = [row for row in rows if row["by"] != "ours"]
        yield "| " + " | ".join([what, *_fastest(ours, share=True)[1:], *_fastest(others)]) + " |"


def _groups(rows: Iterable[dict[str, Any]], keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[dict]]]:
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from groups.items()


def _fastest(rows: Iterable[dict[str, Any]], share: bool = False) -> list[str]:
    """Who was the fastest and its time, and its share of the floor; a wrong result does not count."""
    timed = [row for row in rows if "ms" in row and "wrong" not in row]
    if not timed:
        return ["", "", ""] if share else ["", ""]
    best = min(timed, key=lambda row: row["ms"])
    return [best["by"], f"{best['ms']:.4g}", *([f"{best.get('share of floor', 0):.0%}"] if share else [])]


if __name__ == "__main__":
    main()
