"""What a run found, as Markdown: `python -m gpu.table FOLDER` prints it."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import record

OPERATOR = ("operator", "case", "pass", "by")
MODEL = ("what", "by")
FIGURES = ("ms", "iqr, ms", "floor, ms", "share of floor", "share of serial bound", "GB/s", "TFLOP/s", "peak, MB")


def of(folder: Path) -> str:
    """Everything that a folder of results holds."""
    return "\n".join(_lines(folder)) + "\n"


def _lines(folder: Path) -> Iterator[str]:
    machine = record.read(folder / "machine.json") or {}
    yield title(machine)
    yield ""
    yield from stages(folder)
    for name, keys in (("models", MODEL), ("operators", OPERATOR)):
        found = record.read(folder / f"{name}.json")
        if found and found["rows"]:
            yield from ["", f"{name}, bf16", ""]
            yield from measurements(found["rows"], keys)


def title(machine: dict[str, Any]) -> str:
    words = [machine.get("device", "unknown device"), machine.get("date", "")]
    words += [f"{name} {version}" for name, version in machine.get("packages", {}).items() if version][:3]
    words += [f"cuDNN {machine['cudnn']}"] if machine.get("cudnn") else []
    peaks = machine.get("peaks", {})
    if peaks:
        products = peaks["products, TFLOP/s"].get("torch.bfloat16")
        words += [f"copy {peaks['copy, GB/s']} GB/s", f"bf16 products {products} TFLOP/s"]
    dry = "Dry run at toy sizes; its times say nothing. " if machine.get("dry_run") else ""
    return dry + ", ".join(filter(None, words))


def stages(folder: Path) -> Iterator[str]:
    """What became of each stage."""
    path = folder / "stages.json"
    if not path.exists():
        return
    yield "| stage | outcome | s | found |"
    yield "|---|---|---|---|"
    for name, one in json.loads(path.read_text())["stages"].items():
        yield f"| {name} | {one['outcome']} | {one['seconds']} | {_summary(record.read(folder / f'{name}.json'))} |"


def _summary(found: dict[str, Any] | None) -> str:
    if found is None:
        return "nothing"
    words = [f"{count} {outcome}" for outcome, count in sorted(found.get("counts", {}).items())]
    rows = found["rows"]
    for key in ("wrong", "absent"):
        count = sum(key in row for row in rows)
        words += [f"{count} {key}"] if count else []
    words += [f"{len(rows)} rows"] if rows else []
    words += [f"different results: {sum(r['different'] for r in rows)}"] if rows and "different" in rows[0] else []
    words += [f"{row['tool']}: {row['outcome']}" for row in rows if "tool" in row]
    words += [f"extension: {found['build'].get('how')}"] if "build" in found else []
    words += [f"absent: {found['absent']}"] if "absent" in found else []
    words += [f"{len(found['left_out'])} left out for time"] if found["left_out"] else []
    return ", ".join(words)


def measurements(rows: Iterable[dict[str, Any]], keys: tuple[str, ...]) -> Iterator[str]:
    """Rows of one kind, side by side what computes the same; then who was absent, and why."""
    rows = list(rows)
    order = {group: i for i, group in enumerate(dict.fromkeys(_group(row, keys) for row in rows))}
    columns = [key for key in FIGURES if any(key in row for row in rows)]
    yield "| " + " | ".join([*keys, *columns]) + " |"
    yield "|" + "---|" * (len(keys) + len(columns))
    timed = [row for row in rows if "ms" in row]
    for row in sorted(timed, key=lambda row: (order[_group(row, keys)], row["ms"])):
        cells = [*(str(row[key]) for key in keys), *(_cell(key, row.get(key)) for key in columns)]
        yield "| " + " | ".join(cells) + (" **wrong** |" if "wrong" in row else " |")
    others = [row for row in rows if "ms" not in row]
    if others:
        yield ""
    for row in others:
        kind = "wrong" if "wrong" in row else "absent"
        reason = row.get(kind, "").split("\n")[0]
        yield f"- {', '.join(str(row[key]) for key in keys if key in row)}: {kind}: {reason}"


def _group(row: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in keys[:-1])


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if key.startswith("share") else f"{value:.4g}"


if __name__ == "__main__":
    print(of(Path(sys.argv[1])), end="")
