"""What the doctor says, where all is well and where parts are missing."""

import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_doctor_says_what_runs_here(run_command):
    status, out, _ = run_command("doctor")
    assert status == 0
    for word in ("cogvx ", "torch ", "triton ", "cpu ", "expert_layernorm ", "compiler ", "embedded checkpoint"):
        assert word in out
    assert torch.__version__ in out and torch.backends.cpu.get_cpu_capability() in out


def test_doctor_works_without_triton_and_extension():
    program = """
import sys
sys.modules["triton"] = sys.modules["cogvx_kernels._C"] = None
sys.argv = ["cogvx", "doctor"]
from cogvx.__main__ import main
main()
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    row = next(line for line in run.stdout.splitlines() if line.lstrip().startswith("expert_layernorm"))
    assert row.split()[1] == "reference;" and "no native: the compiled extension cannot be loaded" in row
    assert "no triton: " in row
