"""Every Triton kernel compiles for every architecture, without a GPU: no spills, shared memory within limits.

docs/triton.md lists what each Triton kernel needs; `python tests/kernels/test_compile.py` writes it anew.
"""

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMITS = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB a block, by compute capability
OPERATORS = sorted(path.parent.name for path in ROOT.glob("cogvx_kernels/*/_triton.py"))
TABLE = ROOT / "docs" / "triton.md"
HEADER = """# What the Triton kernels need

Registers a thread and shared memory in bytes, compiled ahead of time by Triton {version}; no kernel spills a register.
Written by `python tests/kernels/test_compile.py`, kept true by `tests/kernels/test_compile.py`.

| operator | kernel | {architectures} |
|---|---|{dashes}
"""


def compile_triton(op: str, *capabilities: int) -> None:
    """Print, a line of JSON a kernel, what it needs. Runs in a process of its own, without the interpreter."""
    for capability in capabilities:
        compile_for(op, capability)


def compile_for(op: str, capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cases, module = (importlib.import_module(f"cogvx_kernels.{op}.{name}") for name in ("cases", "_triton"))
    for kernel, types, constants, options in cases.kernels(module, capability):
        # What the launcher would find: ":16" marks addresses, sizes and strides that 16 divides.
        aligned = [name for name, kind in types.items() if kind.endswith(":16")]
        hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        signature = {name: kind.removesuffix(":16") for name, kind in types.items()}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, hints)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
        needs = {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout)}
        dtype = next(kind for kind in signature.values() if kind.startswith("*"))[1:]
        shape = " ".join(f"{name}={value}" for name, value in constants.items())
        name, shared = f"{kernel.__name__} {dtype} {shape}", compiled.metadata.shared
        print(json.dumps({"capability": capability, "kernel": name, "shared": shared} | needs))


def read_with_ones(op: str, capability: int = 90) -> None:
    """Print the kernels whose body Triton reads where every size and stride is 1: the launcher makes those constants.

    A constant is a plain number of Python, on which methods of tensors such as `.to` fail. The interpreter makes none.
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    cases, module = (importlib.import_module(f"cogvx_kernels.{op}.{name}") for name in ("cases", "_triton"))
    for kernel, types, constants, options in cases.kernels(module, capability):
        constants = constants | {name: 1 for name, kind in types.items() if kind.startswith("i")}
        signature = types | dict.fromkeys(constants, "constexpr")
        signature = {name: signature[name].removesuffix(":16") for name in kernel.arg_names}
        options, context = backend.parse_options(dict(options)), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        helpers = backend.get_codegen_implementation(options), backend.get_module_map()
        ASTSource(kernel, signature, constants, {}).make_ir(target, options, *helpers, context)
        print(json.dumps({"kernel": kernel.__name__}))


def in_own_process(cache: Path, *arguments: object) -> list[dict]:
    """What this file's command prints, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *map(str, arguments)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


def what_kernels_need(op: str, capabilities: Sequence[int], cache: Path) -> dict[int, list[dict]]:
    kernels = in_own_process(cache, "needs", op, *capabilities)
    return {capability: [one for one in kernels if one["capability"] == capability] for capability in capabilities}


def listed_needs(op: str, capability: int) -> dict[str, str]:
    """The table's cells of one operator and architecture, by kernel."""
    column = 3 + list(SHARED_LIMITS).index(capability)
    rows = [line.split("|") for line in TABLE.read_text().splitlines() if line.startswith(f"| {op} |")]
    return {row[2].strip(): row[column].strip() for row in rows if row[column].strip()}


def cell(needs: dict) -> str:
    return f"{needs['reg']}, {needs['shared']}"


# In every run one operator of each family for one of two architectures, in turns; all for all by `make soak`.
LIKE_ANOTHER = ("downsample_conv", "gated_expert_layernorm", "int8_joint_attention", "upsample_conv")
COMPILATIONS = [
    *((op, [(90, 120)[i % 2]]) for i, op in enumerate(OPERATORS) if op not in LIKE_ANOTHER),
    *(pytest.param(op, list(SHARED_LIMITS), marks=pytest.mark.soak) for op in OPERATORS),
]


@pytest.mark.parametrize(("op", "capabilities"), COMPILATIONS, ids=str)
def test_triton_kernels_compile(op, capabilities, tmp_path):
    found = what_kernels_need(op, capabilities, tmp_path)
    for capability, kernels in found.items():
        assert kernels
        for needs in kernels:
            assert needs["stack"] == needs["local"] == 0, f"spills: {needs}"
            assert 0 < needs["reg"] <= 255, needs
            assert needs["shared"] <= SHARED_LIMITS[capability] * 1024, needs
    pinned = re.search(r"Triton ([\d.]+);", TABLE.read_text())[1]
    if (version := importlib.metadata.version("triton")) != pinned:
        pytest.skip(f"the table is of Triton {pinned}, this is {version}")
    for capability, kernels in found.items():
        assert listed_needs(op, capability) == {needs["kernel"]: cell(needs) for needs in kernels}


def test_triton_kernels_read_sizes_of_one(tmp_path):
    assert len(in_own_process(tmp_path, "ones", *OPERATORS)) > len(OPERATORS)


def write_table() -> None:
    version = importlib.metadata.version("triton")
    architectures = " | ".join(f"sm_{capability}" for capability in SHARED_LIMITS)
    lines = [HEADER.format(version=version, architectures=architectures, dashes="---|" * len(SHARED_LIMITS))]
    for op in OPERATORS:
        with tempfile.TemporaryDirectory() as cache:
            needs = what_kernels_need(op, tuple(SHARED_LIMITS), Path(cache))
        columns = [{one["kernel"]: cell(one) for one in column} for column in needs.values()]
        for kernel in dict.fromkeys(kernel for column in columns for kernel in column):  # tiles differ by architecture
            lines.append(f"| {op} | {kernel} | {' | '.join(column.get(kernel, '') for column in columns)} |\n")
    TABLE.write_text("".join(lines))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["needs", op, *capabilities]:
            compile_triton(op, *map(int, capabilities))
        case ["ones", *ops]:
            for op in ops:
                read_with_ones(op)
        case _:
            write_table()
