"""Every GPU kernel compiles for every architecture, without a GPU: no spills, shared memory within limits."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMITS = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB a block, by compute capability
SOURCES = sorted(ROOT.glob("csrc/**/*.cu"))


def expert_layernorm_kernels(triton_module):
    """Kernel, types of its arguments and options, for the real widths."""
    for dtype, width in (("bf16", 1920), ("bf16", 3072), ("fp32", 3072)):
        for kernel, rows in (
            (triton_module.forward_kernel, triton_module.FORWARD_ROWS),
            (triton_module.backward_kernel, triton_module.BACKWARD_ROWS),
        ):
            options = triton_module.options(width, rows)
            constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
            sizes = ("num_rows", "num_text", "width")
            types = dict.fromkeys(kernel.arg_names, f"*{dtype}")
            types |= {name: "i32" for name in kernel.arg_names if name in sizes or name.endswith(("_b", "_n", "_m"))}
            types |= {"eps": "fp32"} | ({"partials": "*fp32"} if "partials" in types else {})
            yield kernel, {name: types[name] for name in kernel.arg_names if name not in constants}, constants, options


KERNELS = {"expert_layernorm": expert_layernorm_kernels}


def compile_triton(op: str, capability: int) -> None:
    """Print, a line of JSON a kernel, what it needs. Runs in a process of its own, without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel, types, constants, options in KERNELS[op](importlib.import_module(f"cogvx_kernels.{op}._triton")):
        # What the launcher would find: pointers, widths and strides that 16 divides.
        aligned = [n for n in types if types[n][0] == "*" or n == "width" or n.endswith(("_b", "_n", "_m"))]
        hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        signature = types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, hints)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
        needs = {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout)}
        print(json.dumps({"kernel": kernel.__name__, "shared": compiled.metadata.shared} | needs))


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("capability", SHARED_LIMITS)
def test_triton_kernels_compile(op, capability, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, op, str(capability)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    kernels = [json.loads(line) for line in found.stdout.splitlines()]
    assert kernels
    for needs in kernels:
        assert needs["stack"] == needs["local"] == 0, f"spills: {needs}"
        assert 0 < needs["reg"] <= 255, needs
        assert needs["shared"] <= SHARED_LIMITS[capability] * 1024, needs


def test_every_triton_operator_is_compiled_here():
    declared = {path.parent.name for path in ROOT.glob("cogvx_kernels/*/_triton.py")}
    assert declared == set(KERNELS)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "csrc")))
def test_nvcc_compiles(source, tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
    command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", *architectures, "--Werror=all-warnings", "-Xptxas=-v"]
    command += ["-Xcompiler=-Wall,-Wextra", "-c", str(source), "-o", str(tmp_path / "kernel.o")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", found.stderr)]
    assert spills and not any(spills), found.stderr[-2000:]


if __name__ == "__main__":
    compile_triton(sys.argv[1], int(sys.argv[2]))
