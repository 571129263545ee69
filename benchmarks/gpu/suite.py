"""The stages of tests: pytest with a record of every outcome as it comes, for as long as there is time."""

import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from timing import DEVICE, TOY

from .record import Record, from_arguments

ROOT = Path(__file__).resolve().parents[2]
WRITE_EVERY = 2.0  # seconds


class Recorder:
    """A plugin of pytest."""

    def __init__(self, record: Record):
        self.record, self.counts, self.failed, self.reasons = record, {}, {}, {}
        self.written = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = "error" if report.when != "call" and report.failed else report.outcome
        self.counts[outcome] = self.counts.get(outcome, 0) + 1
        if outcome in ("error", "failed"):
            self.failed[report.nodeid] = report.longreprtext[-1500:]
        elif outcome == "skipped" and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2]
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if time.monotonic() - self.written > WRITE_EVERY:
            self.write()
        if self.record.seconds_left() < 0:
            self.record.leave_out("the tests that come later")
            pytest.exit("the time of this stage is over", returncode=0)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.counts["error"] = self.counts.get("error", 0) + 1
            self.failed[report.nodeid] = str(report.longrepr)[-1500:]

    def write(self) -> None:
        self.written = time.monotonic()
        self.record.put(counts=self.counts, failed=self.failed, skipped_because=self.reasons)


def words(stage: str) -> list[str]:
    """What pytest is asked for in a stage."""
    if stage == "primitives":
        return ["tests/host_cuda/test_primitives.py"]
    if stage == "model_tests":
        return ["tests/test_devices.py", *(("-k", "the_transformer") if TOY else ())]
    if TOY:
        return ["tests/kernels/test_contract.py", "-k", "(results_and or every_value) and expert_layernorm and float32"]
    # Compiling for other GPUs needs none; what is general comes before what is each operator's own.
    others = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "kernels").glob("test_*.py"))
    first = "tests/kernels/test_contract.py"
    return [first, *(path for path in others if path not in (first, "tests/kernels/test_compile.py"))]


def required(stage: str) -> list[str]:
    """On a GPU every declared kernel for it must run; without one the interpreter stands in for Triton."""
    if stage != "operator_tests":
        return []
    return ["--require", "cuda,triton" if DEVICE == "cuda" else "triton"]


def workers() -> list[str]:
    """Tests spend their time in compilers, of which several can be at work."""
    if TOY or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(10, len(os.sched_getaffinity(0)) - 2)))]


def main() -> None:
    record = from_arguments()
    stage = record.path.stem
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    there = all(shutil.which(tool, path=path) for tool in ("cmake", "ninja", "g++"))
    if stage == "primitives" and DEVICE == "cpu" and not there:
        record.put(absent="cmake, ninja and g++ are needed to compile the stand-in for a GPU")
        record.finish()
        return
    recorder = Recorder(record)
    os.chdir(ROOT)
    status = pytest.main(
        [*words(stage), "-q", "--tb=short", "-p", "no:cacheprovider", *required(stage), *workers()], plugins=[recorder]
    )
    recorder.write()
    record.put(status=int(status))
    record.finish()
    bad = recorder.counts.get("failed", 0) + recorder.counts.get("error", 0)
    raise SystemExit(1 if bad or (status and not record.content["left_out"]) else 0)


if __name__ == "__main__":
    main()
