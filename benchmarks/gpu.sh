#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build with CUDA, test, compare with plain PyTorch, write down what ran.
#
#   benchmarks/gpu.sh [FOLDER]      default: $OUT, else benchmarks/results; --cpu runs it where there is no GPU
#
# PYTHON names an interpreter that has torch already; else a .venv is made as `make` does it.
set -euo pipefail
cd "$(dirname "$0")/.."

cpu=0
if [[ "${1:-}" == --cpu ]]; then
  cpu=1
  shift
fi
results="${1:-${OUT:-benchmarks/results}}"
mkdir -p "$results"

if [[ -z "${PYTHON:-}" ]]; then
  make install
  PYTHON=.venv/bin/python
fi
cuda="$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))')"
if [[ "$cuda" == 0 && "$cpu" == 0 ]]; then
  echo "gpu.sh: torch sees no GPU; --cpu runs the same steps without one" >&2
  exit 1
fi
if [[ "$cuda" == 1 ]]; then # the extension may have been built where there was no nvcc, or for other GPUs
  "$PYTHON" -m pip install --quiet --no-deps --force-reinstall --editable .
fi

"$PYTHON" - <<'PY' | tee "$results/machine.json"
import datetime, json, os, platform, subprocess

import torch
import triton

from cogvx_kernels import _extension, explain

machine = {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None,
    "python": platform.python_version(),
    "torch": torch.__version__,
    "triton": triton.__version__,
    "cuda of torch": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    "cpus": len(os.sched_getaffinity(0)),
    "gpu": None,
    "extension": _extension.built_with(),
    "backends": explain(),
}
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0"]
    machine["gpu"] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "GiB": round(properties.total_memory / 2**30, 1),
        "driver, clock, power": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
    }
print(json.dumps(machine, indent=2))
PY

status=0
unset TRITON_INTERPRET
if [[ "$cuda" == 1 ]]; then
  "$PYTHON" -m pytest tests/kernels --require native,triton -q 2>&1 | tee "$results/tests.txt" || status=$?
else
  "$PYTHON" -m pytest tests/kernels/test_expert_layernorm.py -q 2>&1 | tee "$results/tests.txt" || status=$?
fi
"$PYTHON" -m pytest benchmarks -q --benchmark-json="$results/benchmarks.json" --benchmark-group-by=group \
  --benchmark-columns=median,iqr,rounds 2>&1 | tee "$results/benchmarks.txt" || status=$?

"$PYTHON" - "$results" <<'PY'
import json, pathlib, sys

results = pathlib.Path(sys.argv[1])
machine = json.loads((results / "machine.json").read_text())
runs = json.loads((results / "benchmarks.json").read_text())["benchmarks"]
name = machine["gpu"]["name"] if machine["gpu"] else f"CPU, {machine['cpus']} processors"
lines = [
    f"{name}, {machine['date']}, torch {machine['torch']}, triton {machine['triton']}",
    "",
    "| group | backend | median ms | GB/s | share of copy | TFLOP/s | share of matmul peak | x reference |",
    "|---|---|---|---|---|---|---|---|",
]
figures = ["GB/s", "share of copy bandwidth", "TFLOP/s", "share of matmul peak", "x reference"]
for run in sorted(runs, key=lambda run: (run["group"], run["stats"]["median"])):
    info, median = run["extra_info"], run["stats"]["median"] * 1e3
    found = [("" if key not in info else f"{info[key]:.0%}" if key.startswith("share") else str(info[key])) for key in figures]
    what = run["params"].get("backend", run["param"])
    lines.append(f"| {run['group']} | {what} | {median:.3f} | {' | '.join(found)} |")
(results / "table.md").write_text("\n".join(lines) + "\n")
print("\n".join(lines))
PY
exit "$status"
