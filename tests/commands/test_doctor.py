"""What the doctor says, where all is well and where parts are missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cogvx_kernels import _extension

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


CONFIGURE = """
cmake_minimum_required(VERSION 3.24...4.0)
project(reason LANGUAGES CXX)
include("{root}/cmake/cuda.cmake")
file(WRITE "{file}" "${{COGVX_CUDA_DEFINITIONS}}")
"""


def reason_of_build(environment, folder):
    """What an extension that is built in this environment says of CUDA."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("no cmake on this machine")
    file = folder / "definitions"
    (folder / "CMakeLists.txt").write_text(CONFIGURE.format(root=ROOT.as_posix(), file=file.as_posix()))
    command = [cmake, "-S", folder, "-B", folder / "build"]
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    name, reason = file.read_text().split("=", 1)
    assert name == "COGVX_CUDA_REASON"
    return reason.strip('"')


@pytest.fixture
def extension(monkeypatch):
    """`extension(cuda, reason)`: as if the extension had been built so."""

    def build(cuda, reason):
        built = _extension.built_with() | {"cuda": cuda, "cuda_archs": cuda and "80,90a", "cuda_reason": reason}
        text = f"the extension was built without CUDA: {reason}"
        fake = SimpleNamespace(built_with=lambda: built, why_not_cuda=lambda device: text)
        monkeypatch.setattr(_extension, "_C", fake)
        _extension._why_not_elsewhere.cache_clear()
        _extension._why_not_device.cache_clear()

    yield build
    _extension._why_not_elsewhere.cache_clear()
    _extension._why_not_device.cache_clear()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CUDACXX": "no-such-nvcc"}, "no working nvcc was found"),
        ({"COGVX_CUDA": "0"}, "turned off by COGVX_CUDA=0"),
    ],
    ids=["no nvcc", "turned off"],
)
def test_doctor_says_why_it_was_built_without_cuda(
    environment, expected, extension, run_command, tmp_path, monkeypatch
):
    reason = reason_of_build(environment, tmp_path)
    assert reason == expected
    extension(None, reason)
    monkeypatch.setattr(_extension, "_on_host", None)
    lines = run_command("doctor")[1].splitlines()
    (row,) = (line for line in lines if line.startswith("  expert_layernorm"))
    assert f"no cuda: the extension was built without CUDA: {reason}" in row
    assert [line.split() for line in lines if line.startswith("  CUDA")] == [["CUDA", "no:", *reason.split()]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_says_that_there_is_no_gpu(extension, run_command, monkeypatch):
    extension("13.0", None)
    monkeypatch.setattr(_extension, "_on_host", None)
    lines = run_command("doctor")[1].splitlines()
    (row,) = (line for line in lines if line.startswith("  expert_layernorm"))
    assert "no cuda: CUDA kernels run on CUDA devices, not on cpu, and torch finds no GPU here" in row
    assert any(line.startswith("  cuda") and "finds no GPU" in line for line in lines)
