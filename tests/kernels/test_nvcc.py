"""Every CUDA kernel compiles without warnings or spills, and docs/cuda.md says what each needs and what it is made of.

`PYTHONPATH=tests/host_cuda python tests/kernels/test_nvcc.py` writes the table anew. Shared memory is what the launches
at the sizes of the released models ask for, noted down on the host without running them.
"""

import functools
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import host_cuda
import pytest
import torch

from cogvx_kernels import _extension
from cogvx_kernels._op import OPS, _takes_needs

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("csrc/**/*.cu"), ROOT / "tests/host_cuda/probe.cu"])
FOLDERS = list(dict.fromkeys(source.parent for source in SOURCES))
OPERATORS = [name for name, op in OPS.items() if "cuda" in op.backends]
ARCHITECTURES = ["80", "90a", "100", "120"]
SHARED_LIMITS = {"80": 163, "90a": 227, "100": 227, "120": 99}  # KiB a block
INSTRUCTIONS = ("HMMA", "IMMA", "LDSM", "LDGSTS", "MUFU.EX2")  # products, their loads, copies that run on, exponentials
TABLE = ROOT / "docs" / "cuda.md"
HEADER = """# What the CUDA kernels need

Registers a thread / the most shared memory that a launch of the released models' sizes asks for, in KiB / instructions
of matrix products (HMMA in 16 bits, IMMA in 8), of their loads (LDSM), of asynchronous copies (LDGSTS) and exponentials
(EX2) where there are any. Compiled by nvcc {version}; no kernel spills a register or uses local memory, but for 16
bytes on sm_100 in the backward pass of `gated_expert_layernorm`, for widths that are no multiple of a vector.
Written by `PYTHONPATH=tests/host_cuda python tests/kernels/test_nvcc.py`, kept true by the same file as a test.

| operator | kernel | {architectures} |
|---|---|{dashes}
"""


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version() -> str:
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", said)[1]


@functools.cache  # the table and what is asked of every kernel are checked in one test, so that it is compiled once
def compiled(source: Path, architecture: str) -> dict[str, dict]:
    """Of each kernel of a source: registers, bytes of stack and spills, and its instructions, counted."""
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc(), "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{architecture}", "-cubin"]
        command += ["--Werror=all-warnings", "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra", source, "-o", cubin]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        sass = disassembled(cubin)
    found = {}
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill.*?Used (\d+) registers"
    for name, stack, spills, registers in re.findall(pattern, done.stderr, re.DOTALL):
        body = sass.get(name)
        found[short(demangled(name))] = {
            "registers": int(registers),
            "stack": int(stack),
            "spills": int(spills),
            "local": body and len(re.findall(r"\b(?:LDL|STL)\b", body)),
            "counts": body and {word: len(re.findall(rf"\b{re.escape(word)}\b", body)) for word in INSTRUCTIONS},
        }
    return found


def disassembled(cubin: Path) -> dict[str, str]:
    """Instructions by mangled name; empty where there is no disassembler."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton")
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    listing = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)", listing)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def demangled(name: str) -> str:
    return subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()


def short(name: str) -> str:
    """A kernel's name without namespaces, spaces and parameters, the same from every compiler."""
    name = re.sub(r"\(anonymous namespace\)::|\{anonymous\}::", "", name.removeprefix("void "))
    name = (
        re.sub(r"\((?:int|bool|unsigned int|long)\)", "", name)
        .replace("__nv_bfloat16", "bf16")
        .replace("__half", "fp16")
    )
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = i
            break
    name = re.sub(r"\w+::", "", name[:end]).replace("true", "1").replace("false", "0")
    return re.sub(r"\s*([<>,])\s*", r"\1", name).replace(",", ", ")


@functools.cache
def shared_memory(op: str) -> dict[str, int]:
    """The most bytes that launches at real sizes ask for, by kernel."""
    path = host_cuda.build()
    machine, most = host_cuda.Machine(path), {}
    module, cases = OPS[op]._module("cuda"), import_module(f"cogvx_kernels.{op}.cases")
    machine.launches()
    machine.record(True)
    try:
        with _extension.cuda_on_host(host_cuda.load(path)):
            for case in [*cases.REAL.values(), *cases.SMALL]:
                for dtype in module.FOR_DTYPES:
                    record_calls(op, module, unfilled(case, dtype))
    finally:
        machine.record(False)
    for name, _, _, shared in machine.launches():
        most[short(name)] = max(shared, most.get(short(name), 0))
    return most


def unfilled(case, dtype) -> tuple:
    """The arguments of a case in memory that nobody has written, which costs nothing however large they are."""
    args = case.func(*case.args, **case.keywords, device="meta", dtype=dtype)
    if args[0].dim() == 5:  # a video as the kernels take it, so that none is copied
        args = (args[0].contiguous(memory_format=torch.channels_last_3d), *args[1:])
    return tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if torch.is_tensor(x) else x for x in args)


def record_calls(op: str, module, args: tuple) -> None:
    if module.why_not(*args) is not None:
        return
    y = module.forward(*args)
    if OPS[op].differentiable and hasattr(module, "backward"):
        grads = [torch.empty_like(part) for part in (y if isinstance(y, tuple) else (y,))]
        needs = [torch.is_tensor(args[i]) for i in OPS[op]._tensors]
        module.backward(*grads, *args, **({"needs": needs} if _takes_needs(module.backward) else {}))


def cells(op: str, architecture: str) -> dict[str, str]:
    """The table's cells of one operator and architecture, by kernel."""
    found, shared = {}, shared_memory(op)
    for source in sorted((ROOT / "csrc" / op).glob("*.cu")):
        for kernel, needs in compiled(source, architecture).items():
            counts = [f"{n} {word.removeprefix('MUFU.')}" for word, n in needs["counts"].items() if n]
            kib = f"{shared[kernel] / 1024:.1f}" if kernel in shared else "?"
            found[kernel] = " / ".join([str(needs["registers"]), kib, *([", ".join(counts)] if counts else [])])
    return found


def listed(op: str, architecture: str) -> dict[str, str]:
    column = 3 + ARCHITECTURES.index(architecture)
    rows = [line.split("|") for line in TABLE.read_text().splitlines() if line.startswith(f"| {op} |")]
    return {row[2].strip().strip("`"): row[column].strip() for row in rows if row[column].strip()}


# Bytes of stack and of spills, where there are any; the header of the table says so.
SPILLS = {
    ("gated_expert_layernorm", f"backward_kernel<{dtype}, Scalars<{dtype}>>", "100"): found
    for dtype, found in (("bf16", (16, 16)), ("fp16", (16, 16)), ("float", (8, 4)))
}

# In every run one operator of each family is compiled for one architecture, in turns; all for all by `make soak`, and
# by the build of the extension, which every run of `make test` on a fresh clone begins with.
LIKE_ANOTHER = (
    "causal_conv3d_moments",
    "downsample_conv",
    "gated_expert_layernorm",
    "int8_joint_attention",
    "upsample_conv",
)
IN_EVERY_RUN = {folder: ("80", "90a")[i % 2] for i, folder in enumerate(FOLDERS) if folder.name not in LIKE_ANOTHER}
COMPILATIONS = [
    pytest.param(folder, architecture, marks=() if architecture == IN_EVERY_RUN.get(folder) else pytest.mark.soak)
    for folder in FOLDERS
    for architecture in ARCHITECTURES
]


@pytest.mark.parametrize(("folder", "architecture"), COMPILATIONS, ids=lambda x: getattr(x, "name", x))
def test_no_warnings_no_spills_and_the_table_is_true(folder, architecture):
    if nvcc() is None:
        pytest.skip("no nvcc on this machine")
    for source in (source for source in SOURCES if source.parent == folder):
        kernels = compiled(source, architecture)
        assert kernels
        for name, needs in kernels.items():
            key = folder.name, name, architecture
            assert (needs["stack"], needs["spills"]) == SPILLS.get(key, (0, 0)), (name, needs)
            assert needs["local"] == 0 or key in SPILLS, (name, needs)
    op = folder.name
    if op not in OPERATORS:
        return
    pinned = re.search(r"nvcc ([\d.]+);", TABLE.read_text())[1]
    if nvcc_version() != pinned:
        pytest.skip(f"the table is of nvcc {pinned}, this is {nvcc_version()}")
    assert max(shared_memory(op).values()) <= SHARED_LIMITS[architecture] * 1024
    assert listed(op, architecture) == cells(op, architecture)


def test_every_operator_is_in_the_table():
    assert set(OPERATORS) <= {folder.name for folder in FOLDERS}


def write_table() -> None:
    architectures = " | ".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    lines = [HEADER.format(version=nvcc_version(), architectures=architectures, dashes="---|" * len(ARCHITECTURES))]
    for op in OPERATORS:
        columns = [cells(op, architecture) for architecture in ARCHITECTURES]
        for kernel in dict.fromkeys(kernel for column in columns for kernel in column):
            lines.append(f"| {op} | `{kernel}` | {' | '.join(column.get(kernel, '') for column in columns)} |\n")
    TABLE.write_text("".join(lines))


if __name__ == "__main__":
    sys.exit(write_table())
