"""The CPU kernels under AddressSanitizer, in processes that load it first; it finds a bug that is planted."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import host_cuda
import pytest

from cogvx_kernels import _extension

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "asan"

ISAS = _extension.built_with().get("cpu_isas", ["generic"])
SMALL = "native and test_results_and_gradients"  # every small case, forward and backward

# y is a number too short.
TOO_SHORT = """
import sanitized, torch
from cogvx_kernels import _extension
x, weight, y = torch.ones(1, 4, 1, 4, 4), torch.ones(4), torch.empty(63)
_extension._C.group_norm_silu_forward(
    1, ("float32", "float32"), (1, 4, 1, 16), False, 2, 1e-6, 0, 0,
    x.data_ptr(), weight.data_ptr(), weight.data_ptr(), y.data_ptr(),
)
"""


def build() -> Path:
    """The extension, compiled for AddressSanitizer where it is out of date: two minutes on two cores, then seconds."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        settings = {
            "CMAKE_BUILD_TYPE": "Debug",
            "CMAKE_CXX_FLAGS_DEBUG": "-fsanitize=address -g1",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": host_cuda.pybind11_folder(),
        }
        options = [f"-D{name}={value}" for name, value in settings.items()]
        host_cuda.run("env", "COGVX_CUDA=0", "cmake", "-S", ROOT, "-B", FOLDER, "-G", "Ninja", *options)
        host_cuda.run("cmake", "--build", FOLDER)
    return next(FOLDER.glob("_C*.so"))


def run(*command: str, isa: str = "") -> subprocess.CompletedProcess:
    # The library of C++ beside it: the sanitizer stands before its exceptions, and looks for them when it starts.
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(HERE),
        "SANITIZED": str(build()),
        "COGVX_CPU_ISA": isa,
    }
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def check(done: subprocess.CompletedProcess) -> None:
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "Sanitizer" not in said, said[-6000:]
    assert f"extension: {next(FOLDER.glob('_C*.so'))}" in done.stdout and " passed" in done.stdout


def pytest_of(expression: str, *options: str) -> list[str]:
    options = ["--require", "native", "-p", "sanitized", "-k", expression, *options]
    return ["-m", "pytest", "tests/kernels/test_contract.py", *options]


@pytest.mark.soak
def test_a_write_out_of_bounds_is_found():
    done = run("-c", TOO_SHORT)
    assert done.returncode != 0 and "ERROR: AddressSanitizer" in done.stderr, (done.stdout + done.stderr)[-6000:]


@pytest.mark.soak
@pytest.mark.parametrize("isa", ISAS)
def test_legal_calls_stay_in_bounds(isa):
    check(run(*pytest_of(SMALL), isa=isa))


@pytest.mark.soak
def test_random_legal_calls_stay_in_bounds():
    check(run(*pytest_of("native and test_legal_fuzz", "--calls=100")))


@pytest.mark.soak
def test_illegal_calls_are_refused_in_bounds():
    check(run(*pytest_of("native and test_illegal_fuzz", "-m", "soak")))
