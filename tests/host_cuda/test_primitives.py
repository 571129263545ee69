"""The stand-in's warp instructions against the tables of the PTX manual, and with a GPU the GPU's against the same.

Sections of the manual (PTX ISA 9.0): "Matrix Fragments for mma.m16n8k16 with floating point type", "... for
mma.m16n8k32", "ldmatrix". %laneid is lane here, groupID = lane >> 2, threadID_in_group = lane % 4.
"""

import ctypes
import shutil
import subprocess

import host_cuda
import numpy as np
import pytest
import torch

LANES = range(32)


@pytest.fixture(scope="module", params=["gpu" if torch.cuda.is_available() else "host"])
def probe(request, tmp_path_factory):
    """`probe(what, a, b, d)`: registers in, by lane; d out."""
    if request.param == "host":
        library, device = ctypes.CDLL(str(host_cuda.build())), "cpu"
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if nvcc is None:
            pytest.skip("no nvcc on this machine")
        target = tmp_path_factory.mktemp("probe") / "probe.so"
        sources = host_cuda.HERE / "probe.cu", host_cuda.HERE.parents[1] / "csrc"
        command = [nvcc, "-std=c++17", "-arch=native", "-shared", "-Xcompiler=-fPIC", f"-I{sources[1]}"]
        subprocess.run([*command, "-o", str(target), str(sources[0])], check=True)
        library, device = ctypes.CDLL(str(target)), "cuda"
    library.probe.restype = ctypes.c_char_p

    def run(what, a, b, d):
        a, b, d = (torch.from_numpy(np.ascontiguousarray(x).view(np.int32)).to(device) for x in (a, b, d))
        said = library.probe(what, *(ctypes.c_void_p(x.data_ptr()) for x in (a, b, d)))
        assert said is None, said
        return d.cpu().numpy()

    return run


# (row, column) of element i of a fragment, as the manual's formulas give them.
def a_16x16(lane, i):
    row = (lane >> 2) + (0 if 0 <= i < 2 or 4 <= i < 6 else 8)
    return row, lane % 4 * 2 + (i & 1) + (0 if i < 4 else 8)


def b_16x8(lane, i):
    return lane % 4 * 2 + (i & 1) + (0 if i < 2 else 8), lane >> 2


def a_16x32(lane, i):
    row = (lane >> 2) + (0 if 0 <= i < 4 or 8 <= i < 12 else 8)
    return row, lane % 4 * 4 + (i & 3) + (0 if i < 8 else 16)


def b_32x8(lane, i):
    return lane % 4 * 4 + (i & 3) + (0 if i < 4 else 16), lane >> 2


def c_16x8(lane, i):
    return (lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)


def fragments(matrix, place, count):  # -> [lane, element]
    return np.stack([[matrix[place(lane, i)] for i in range(count)] for lane in LANES])


@pytest.mark.parametrize("what", [0, 1], ids=["float16", "bfloat16"])
def test_products_of_16_bits(probe, what):
    rng = np.random.default_rng(what)
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))
    c = rng.integers(-100, 100, (16, 8)).astype(np.float32)
    dtype = torch.float16 if what == 0 else torch.bfloat16

    def registers(matrix, place, count):
        values = torch.tensor(fragments(matrix, place, count), dtype=dtype)
        return values.view(torch.int16).numpy()

    d = probe(what, registers(a, a_16x16, 8), registers(b, b_16x8, 4), fragments(c, c_16x8, 4))
    np.testing.assert_array_equal(d.view(np.float32).reshape(32, 4), fragments(a @ b + c, c_16x8, 4))


def test_products_of_8_bits(probe):
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((16, 32), (32, 8)))
    c = rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
    d = probe(2, fragments(a, a_16x32, 16), fragments(b, b_32x8, 8), fragments(c, c_16x8, 4))
    expected = a.astype(np.int32) @ b.astype(np.int32) + c
    np.testing.assert_array_equal(d.reshape(32, 4), fragments(expected, c_16x8, 4))


@pytest.mark.parametrize("transposed", [False, True])
def test_loads_of_matrices(probe, transposed):
    rows = np.arange(32 * 8, dtype=np.int16).reshape(32, 8)  # row l is named by lane l
    found = probe(4 if transposed else 3, rows, np.zeros(64, np.int32), np.zeros(128, np.int32))
    found = found.view(np.int16).reshape(32, 4, 2)
    for lane in LANES:
        for matrix in range(4):
            of = rows[8 * matrix : 8 * matrix + 8]
            of = of.T if transposed else of
            assert found[lane, matrix].tolist() == of[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()


def test_exchanges(probe):
    values = np.random.default_rng(3).integers(0, 1000, (32, 4)).astype(np.int32)
    found = probe(5, values, np.zeros(64, np.int32), np.zeros(128, np.int32)).reshape(32, 4).view(np.uint32)
    own = values[:, 0]
    odd = sum(1 << lane for lane in LANES if own[lane] % 2)
    for lane in LANES:
        below = own[lane + 1] if lane < 31 else own[lane]
        assert found[lane].tolist() == [own[(lane + 5) % 32], below, own.sum(), odd]


def test_the_larger_of_two_or_a_nan(probe):
    rng = np.random.default_rng(4)
    special = np.array([np.nan, np.inf, -np.inf, 0, 1.5], dtype=np.float32)
    a, b = rng.choice(special, (32, 4)), rng.choice(special, (32, 2))
    found = probe(6, a, b, np.zeros(128, np.int32)).view(np.float32).reshape(32, 4)
    np.testing.assert_array_equal(found, np.maximum(a, np.tile(b, 2)))  # numpy's maximum of a NaN is a NaN
