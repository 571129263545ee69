"""Memory that tensors free stays with the process where the command line asks for it, and nowhere else."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOLD = """
import ctypes, torch
class Held(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
state = ctypes.CDLL(None).mallinfo2
state.restype = Held
tensor = torch.ones(2**24)
apart = state().hblkhd
del tensor
print(apart, state().fordblks)
"""
LARGE = 2**26  # bytes of the tensor


def memory_of_a_large_tensor(program):
    """Bytes that the C library got block by block while a tensor was held, and those that it keeps free after."""
    done = subprocess.run([sys.executable, "-c", program + HOLD], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()[-2:]]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library has no mallinfo2")
def test_the_command_line_keeps_freed_memory_and_the_library_does_not():
    apart, _ = memory_of_a_large_tensor("import cogvx.pipeline, cogvx_kernels\n")
    assert apart >= LARGE
    apart, kept = memory_of_a_large_tensor(
        "import sys; from cogvx.__main__ import main; sys.argv = ['cogvx', '--help']; main()\n"
    )
    assert apart < LARGE
    assert kept >= LARGE
