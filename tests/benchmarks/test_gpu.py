"""The script for a machine with a GPU: without one every stage of it at toy sizes, and what it leaves in the README."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu import readme
from gpu.commands import within
from gpu.readme import ROOT

from cogvx_kernels._op import OPS

STAGES = ("machine", "primitives", "operator_tests", "model_tests", "operators", "models", "races", "sanitizer")


def written(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
def test_a_dry_run_passes_every_stage(tmp_path):
    command = ["bash", "benchmarks/gpu.sh", "--dry-run", str(tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    outcomes = {name: stage["outcome"] for name, stage in written(tmp_path, "stages")["stages"].items()}
    assert outcomes == dict.fromkeys(STAGES, "done")
    results = {name: written(tmp_path, name) for name in STAGES}
    assert [name for name, result in results.items() if result["left_out"]] == []
    for name in ("primitives", "operator_tests", "model_tests"):
        assert results[name]["counts"]["passed"] > 0 and results[name]["failed"] == {}
    rows = results["operators"]["rows"]
    compared = {(row["operator"], row["by"]) for row in rows}
    declared = {(name, by) for name, op in OPS.items() for by in ("eager torch", *op.backends)}
    assert declared <= compared
    assert all(("ms" in row) != ("absent" in row) and "wrong" not in row for row in rows)
    raced = {(row["operator"], row["by"]) for row in results["races"]["rows"]}
    assert {(name, by) for name, by in declared if by in ("native", "minimal")} <= raced
    table = (tmp_path / "table.md").read_text()
    assert all(re.search(rf"^(\| |- ){name}\b.*\b{by}\b", table, re.MULTILINE) for name, by in declared)
    assert all(f"| {stage} | done |" in table for stage in STAGES)


def test_what_needs_too_long_ends_with_all_that_it_started(tmp_path):
    forked = f"sleep 60 & echo $! > {tmp_path}/pid; echo begun; wait"
    assert within(1, ["sh", "-c", forked]) == (None, "begun\n")
    # It has let go of its output, or `within` would still read, and is on its way out.
    stat, end = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat"), time.monotonic() + 30
    while stat.exists() and stat.read_text().split(")")[1].split()[0] != "Z":  # for its new parent to collect
        assert time.monotonic() < end
        time.sleep(0.01)
    assert within(60, ["sh", "-c", "echo out; echo wrong >&2; exit 3"]) == (3, "out\nwrong\n")


def test_the_readme_has_what_the_results_say():
    text = readme.README.read_text()
    assert text == readme.with_results(text, readme.RESULTS)


def test_a_dry_run_says_nothing_about_gpus(tmp_path):
    (tmp_path / "stages.json").write_text(json.dumps({"dry_run": True, "stages": {}}))
    assert list(readme.lines(tmp_path)) == [readme.NONE] == list(readme.lines(tmp_path / "nothing"))


def test_results_become_a_table(tmp_path):
    case = {"operator": "joint_attention", "case": "2b", "pass": "forward"}
    rows = [
        {**case, "by": "cuda", "ms": 2.0, "share of floor": 0.5},
        {**case, "by": "triton", "ms": 1.0, "share of floor": 1.0, "wrong": "so its time does not count"},
        {**case, "by": "eager torch", "ms": 4.0},
        {**case, "by": "SDPA, flash", "ms": 3.0},
        {**case, "by": "FlexAttention", "absent": "it does not import"},
    ]
    blocks = [{"what": "2b, a block", "by": "ours", "ms": 5.0, "share of floor": 0.8}]
    contents = {
        "stages": {"dry_run": False, "stages": {}},
        "machine": {"device": "a device", "rows": [], "left_out": []},
        "operators": {"rows": rows},
        "models": {"rows": blocks},
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = list(readme.lines(tmp_path))
    assert found[0] == "a device"
    assert "| joint_attention | 2b | forward | cuda | 2 | 50% | SDPA, flash | 3 |" in found
    assert "| 2b, a block | 5 | 80% |  |  |" in found
