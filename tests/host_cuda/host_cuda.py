"""The extension with its CUDA kernels compiled for the host, built where it is out of date, and its controls."""

import ctypes
import fcntl
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "host_cuda"


def build(target: str = "plain", sources: Path = HERE, folder: Path = FOLDER) -> Path:
    """The compiled module; `target` is plain, or address or thread with the sanitizers of these names.

    Raises RuntimeError with what the compiler said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "build.ninja").exists():
            settings = {
                "CMAKE_BUILD_TYPE": "None",
                "Python_EXECUTABLE": sys.executable,
                "pybind11_DIR": pybind11_folder(),
            }
            run("cmake", "-S", sources, "-B", folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in settings.items()))
        run("cmake", "--build", folder, "--target", target)
    return next((folder / target).glob("_C*.so"))


def pybind11_folder() -> str:
    import pybind11  # a dependency of builds alone

    return pybind11.get_cmake_dir()


def run(*command: object) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # no sanitizer in cmake
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"the CUDA kernels cannot be compiled for the host:\n{said}")


def load(path: Path) -> ModuleType:
    """The extension module, by a name of its own: the real one and builds of it can be in one process."""
    name = f"host_cuda.{path.parent.name}_{zlib.crc32(bytes(path)):x}._C"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


class Machine:
    """The controls of a built module: the seed of its order of threads, and what it was asked to launch."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.host_cuda_launches.restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        """Threads and blocks run in another order for another seed."""
        self.library.host_cuda_seed(ctypes.c_uint64(seed))

    def record(self, on: bool) -> None:
        """Note launches down without running them."""
        self.library.host_cuda_record(int(on))

    def launches(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...], int]]:
        """Kernel, grid, block and bytes of shared memory of every launch since the last call."""
        lines = self.library.host_cuda_launches().decode().splitlines()
        fields = (line.split("\t") for line in lines)
        return [(_kernel(name), *(tuple(map(int, size.split(","))) for size in (grid, block)), int(shared))
                for name, grid, block, shared in fields]  # fmt: skip


def _kernel(signature: str) -> str:
    """The kernel's name in what the compiler calls the launching function."""
    found = re.search(r"kernel = ([^;]*)[;\]]", signature)
    return found[1].replace("{anonymous}::", "").replace("cogvx::", "") if found else signature
