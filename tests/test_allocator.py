"""Memory that tensors free stays with the process where the command line asks for it, and nowhere else."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COUNT = """
import resource, torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(3)))
"""


def faults_of_a_large_tensor(program):
    """Page faults of 64 MiB that the process has had before."""
    done = subprocess.run([sys.executable, "-c", program + COUNT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_the_command_line_keeps_freed_memory_and_the_library_does_not():
    library = faults_of_a_large_tensor("import cogvx.pipeline, cogvx_kernels\n")
    command_line = faults_of_a_large_tensor(
        "import sys; from cogvx.__main__ import main; sys.argv = ['cogvx', '--help']; main()\n"
    )
    assert library > 10
    assert command_line < library / 10
