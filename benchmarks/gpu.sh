#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes and without a network: builds, tests, compares, measures.
#
#   benchmarks/gpu.sh [FOLDER]             default: $OUT, else benchmarks/results
#   benchmarks/gpu.sh --dry-run [FOLDER]   every stage at toy sizes on the CPU, on any machine
#   benchmarks/gpu.sh --only operators,races
#
# PYTHON names an interpreter that has torch; else .venv's is taken, or python3 where that has it, or .venv is made.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z "${PYTHON:-}" ]]; then
  for candidate in .venv/bin/python python3; do
    if "$candidate" -c 'import torch' 2>/dev/null; then
      PYTHON="$candidate"
      break
    fi
  done
fi
if [[ -z "${PYTHON:-}" ]]; then
  make install
  PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD/benchmarks:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m gpu "$@"
