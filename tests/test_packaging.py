"""The compiled extension and the wheel: nothing of torch inside, every CPU variant right, the checkpoint shipped."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from cogvx_kernels import _extension

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(_extension._C.__file__)


def test_the_extension_holds_nothing_of_torch():
    content = LIBRARY.read_bytes()
    # Names as the linker sees them: at::, c10::, torch:: and the libraries themselves.
    found = re.findall(rb"_ZN?K?(?:2at|3c10|5torch)\w+|lib(?:torch|c10)\w*\.so", content)
    assert found == []
    assert b"PyInit__C" in content  # the search looks at what it should


def test_the_extension_loads_without_torch():
    code = f"""
import importlib.machinery, importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", {str(LIBRARY)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
print(module.built_with()["compiler"])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


def test_it_says_what_was_compiled_in():
    built = _extension.built_with()
    assert built["missing"] is None
    assert built["cpu_isas"][0] == "generic" and built["cpu_isa"] in built["cpu_isas"]
    assert (built["cuda"] is None) == (built["cuda_archs"] is None) == (built["cuda_reason"] is not None)


def test_cuda_is_there_or_the_reason_is():
    reason = _extension._C.why_not_cuda(0)
    if torch.cuda.is_available() and _extension.built_with()["cuda"]:
        assert reason is None
    else:
        assert reason


@pytest.mark.parametrize("isa", _extension.built_with()["cpu_isas"])
def test_every_cpu_variant_is_right_at_any_number_of_threads(isa, tmp_path):
    """Variants may differ in rounding; numbers of threads may not."""
    available = _extension.built_with()["cpu_isas"]
    if available.index(isa) > available.index(_extension.built_with()["cpu_isa"]):
        pytest.skip(f"this processor has no {isa}")
    code = """
import importlib, sys, torch
from cogvx_kernels.expert_layernorm import reference
from cogvx_kernels.expert_layernorm.cases import make
from cogvx_kernels.testing import assert_as_accurate
native = importlib.import_module("cogvx_kernels.expert_layernorm._native")
assert native._extension.built_with()["cpu_isa"] == sys.argv[1]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    args = make(2, 150, 67, 33, dtype=dtype)
    exact = reference.forward(*(x.double() if torch.is_tensor(x) else x for x in args))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([native.forward(*args), *native.backward(args[0], *args)])
    assert_as_accurate(results[0][0], reference.forward(*args), exact)
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(results[0], result))
"""
    environment = os.environ | {"COGVX_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code, isa], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]


def test_sixteen_bit_rounding_is_that_of_torch():
    """Every value of both formats comes through unchanged, and products between them are rounded as torch does."""
    from cogvx_kernels import expert_layernorm, use_backend

    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        shift = values.view(1, 1, -1).expand(1, 2, -1).contiguous()
        width = shift.shape[-1]
        zeros, none = torch.zeros(1, 1, width, dtype=dtype), torch.zeros(width, dtype=dtype)
        with use_backend("native"):  # x, weight and bias 0: y is the shift
            y = expert_layernorm(zeros, none, none, shift, torch.zeros_like(shift), 0, 1e-5)[0, 0]
        torch.testing.assert_close(y, values, rtol=0, atol=0, equal_nan=True)
        # 1 + scale = 1.5 or so puts products between representable values, ties included.
        for scale in (0.5, 0.25, -0.75):
            with use_backend("native"):
                y = expert_layernorm(
                    zeros, none, shift[0, 0], torch.zeros_like(shift), torch.full_like(shift, scale), 0, 1e-5
                )[0, 0]
            expected = (values.float() * (1 + scale)).to(dtype)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_constraints_meet_the_requirements():
    """Each dependency that the project names by a lower bound is pinned at or above it."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {pin.name: next((s.version for s in pin.specifier if s.operator in ("==", ">=")), None) for pin in pins}
    for requirement in map(Requirement, named):
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


@pytest.mark.slow
def test_the_wheel_holds_the_checkpoint_and_the_extension(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    command += ["-C", "cmake.build-type=Debug", "-C", "cmake.define.COGVX_ISA=OFF"]  # what is in it, soon
    found = subprocess.run(command, env=os.environ | {"COGVX_CUDA": "0"}, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert sum(name.startswith("cogvx_kernels/_C.") for name in names) == 1
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "cogvx" / "assets").rglob("*") if path.is_file()}
    assert shipped and shipped <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "examples/", "csrc/"))]
