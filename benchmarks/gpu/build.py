"""The extension for the GPU that is here: as it is installed, by pip without a network, or by the compilers alone."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from .commands import within

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
NAME = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
_CHECK = """
import json
from cogvx_kernels import _extension as e
print(json.dumps([e._missing or e._C.why_not_cuda(0), e._C and e._C.__file__]))
"""


def ensure(seconds_left: Callable[[], float]) -> dict:
    """Leave an extension that runs on the GPU; how it was had, and what stood in the way of easier ways."""
    reason = why_not()
    if reason is None:
        return {"how": "it was installed already"}
    said = {"installed before": reason}
    if find_spec("pybind11") and find_spec("scikit_build_core"):
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--force-reinstall"]
        error = _run([*command, "--editable", "."], seconds_left() - 5)
        reason = error or why_not()
        if reason is None:
            return {"how": "pip, without build isolation", **said}
        said["pip"] = reason
    else:
        said["pip"] = "pybind11 and scikit_build_core cannot both be imported"
    compile_directly(ROOT / "cogvx_kernels" / NAME, _nvcc(), seconds_left=seconds_left)
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"the extension was compiled, but does not run on this GPU: {reason}; {said}")
    return {"how": "the compilers alone", **said}


def why_not() -> str | None:
    """Why the extension that Python finds does not do for this GPU, or None."""
    done = subprocess.run([sys.executable, "-c", _CHECK], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return f"cogvx_kernels cannot be imported: {done.stderr.strip().splitlines()[-1:]}"
    reason, file = json.loads(done.stdout.strip().splitlines()[-1])
    if reason is None:
        newest = max(path.stat().st_mtime for path in CSRC.rglob("*") if path.is_file())
        return f"{file} is older than the sources" if Path(file).stat().st_mtime < newest else None
    return reason


def compile_directly(target: Path, nvcc: str | None, seconds_left: Callable[[], float], only: str = "*") -> None:
    """Compile the extension with g++ and nvcc, every source at once; RuntimeError with what a compiler said.

    pybind11's headers may be those that torch brings. With `only` one operator is compiled, quickly and for portable
    CPUs, which shows that the commands are right but makes nothing to import.
    """
    work = target.parent / f"{target.name}.parts"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    defines = ['-DCOGVX_CUDA_REASON="no nvcc was found"']
    if nvcc is not None:
        arch = _arch()
        defines = [f'-DCOGVX_CUDA_VERSION="{_version(nvcc)}"', f'-DCOGVX_CUDA_ARCHS="{arch}"']
    flags = [*defines, "-O3" if only == "*" else "-O0"]
    commands = _cpu_commands(work, flags, only)
    if nvcc is not None:
        commands += _cuda_commands(work, nvcc, flags, arch, only)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = list(filter(None, pool.map(lambda command: _run(command, seconds_left()), commands)))
    if errors:
        raise RuntimeError(errors[0])
    objects = sorted(map(str, work.glob("*.o")))
    linker = [nvcc, "-cudart=static", "-Xcompiler=-fopenmp"] if nvcc else [_cxx(), "-fopenmp"]
    error = _run([*linker, "-shared", "-o", str(target), *objects], seconds_left())
    shutil.rmtree(work)
    if error:
        raise RuntimeError(error)


def _cpu_commands(work: Path, flags: list[str], only: str) -> list[list[str]]:
    common = [_cxx(), "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-fopenmp-simd", "-fno-trapping-math",
              "-fno-math-errno", f"-I{CSRC}", *flags]  # fmt: skip
    isas = {"generic": []}
    if only == "*" and platform.machine() == "x86_64":
        isas |= _flags_of_variants()
        common.append("-DCOGVX_X86_VARIANTS")
    includes = [f"-I{path}" for path in (_pybind11(), sysconfig.get_path("include"))]
    commands = []
    for source in [CSRC / "module.cpp", *sorted(CSRC.glob(f"{only}/bind*.cpp"))]:
        commands.append([*common, *includes, "-c", str(source), "-o", str(work / f"{_label(source)}.o")])
    for source in sorted(CSRC.glob(f"{only}/cpu*.cpp")):
        for isa, more in isas.items():
            target = work / f"{_label(source)}.{isa}.o"
            commands.append([*common, f"-DCOGVX_ISA={isa}", *more, "-c", str(source), "-o", str(target)])
    return commands


def _flags_of_variants() -> dict[str, list[str]]:
    """What cmake/isa.cmake sets for each instruction set."""
    text, found = (ROOT / "cmake" / "isa.cmake").read_text(), {}
    for isa, flags in re.findall(r"set\(COGVX_FLAGS_(\w+) (-[^)]*|\$[^)]*)\)", text):
        words = re.sub(r"\$\{COGVX_FLAGS_(\w+)\}", lambda match: " ".join(found[match[1]]), flags).split()
        found[isa] = words
    return found


def _cuda_commands(work: Path, nvcc: str, flags: list[str], arch: str, only: str) -> list[list[str]]:
    common = [nvcc, "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{CSRC}", *flags]
    common.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
    sources = [*sorted(CSRC.glob(f"{only}/cuda*.cu")), CSRC / "common" / "device.cu"]
    return [[*common, "-c", str(source), "-o", str(work / f"{_label(source)}.cu.o")] for source in sources]


def _label(source: Path) -> str:
    return f"{source.parent.name}.{source.stem}"


def _pybind11() -> Path:
    if find_spec("pybind11"):
        import pybind11

        return Path(pybind11.get_include())
    return Path(find_spec("torch").submodule_search_locations[0]) / "include"


def _cxx() -> str:
    return os.environ.get("CXX") or "g++"


def _nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _version(nvcc: str) -> str:
    found = re.search(r"V([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return found[1] if found else "unknown"


def _arch() -> str:
    """Of the first GPU; Hopper's own instructions go by 90a."""
    import torch

    major, minor = torch.cuda.get_device_capability(0) if torch.cuda.is_available() else (8, 0)
    return f"{major}{minor}".replace("90", "90a")


def _run(command: list[str], seconds: float) -> str | None:
    """What a command said where it failed."""
    try:
        status, said = within(seconds, command, cwd=ROOT)
    except OSError as error:
        return str(error)[-2000:]
    return None if status == 0 else f"{'' if status is not None else 'its time was up. '}{said[-2000:]}"
