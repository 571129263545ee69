"""The CUDA kernels on the host under AddressSanitizer and ThreadSanitizer, each in a process that loads it first."""

import os
import subprocess
import sys

import host_cuda
import pytest

ROOT = host_cuda.HERE.parents[1]
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
SMALL = ["-k", "test_results_and_gradients and cuda"]  # every small case, forward and backward
FUZZ = ["-k", "test_legal_fuzz and cuda", "--calls=100"]


def run_with(sanitizer: str, options: list[str]) -> subprocess.CompletedProcess:
    library = subprocess.run(["gcc", f"-print-file-name={LIBRARIES[sanitizer]}"], capture_output=True, text=True).stdout
    host_cuda.build(sanitizer)
    environment = os.environ | {
        "LD_PRELOAD": library.strip(),
        "HOST_CUDA_TARGET": sanitizer,
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # on a GPU nothing would run on the host
    }
    command = [sys.executable, "-m", "pytest", "tests/kernels/test_contract.py", "-q", "--require", "cuda", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("sanitizer", "options"),
    [("address", SMALL), ("address", FUZZ), ("thread", SMALL)],
    ids=["address, small", "address, fuzz", "thread, small"],
)
def test_kernels_are_clean(sanitizer, options):
    done = run_with(sanitizer, options)
    assert done.returncode == 0 and "Sanitizer" not in done.stdout + done.stderr, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout
