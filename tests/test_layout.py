"""The rules of the house as code: who imports whom, what stands where, and what is nowhere."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from cogvx_kernels._op import OPS

ROOT = Path(__file__).parents[1]
SOURCES = ("cogvx", "cogvx_kernels", "csrc", "tests", "benchmarks", "examples")

# A module imports from earlier lines or from its own package; cogvx/__init__.py is the face and may reach for any.
LAYERS = (
    ("allocator", "config", "finite", "host", "numerics", "version"),
    ("diffusion",),
    ("models",),
    ("data",),
    ("clip", "settings"),
    ("inputs", "machine"),
    ("parts", "speed", "start"),
    ("denoise",),
    ("parallel",),
    ("memory",),
    ("pipeline",),
    ("extend", "invert", "train", "eval"),
    ("commands",),
    ("__main__",),
)


def files(folder: str, *suffixes: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes and path.is_file())


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, in functions too, by its full name."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            submodules = [f"{module}.{alias.name}" for alias in node.names]
            found = [name for name in submodules if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()]
            yield from found or [module]


def layer(module: str) -> int:
    part = module.split(".")[1]
    for i, names in enumerate(LAYERS):
        if part in names:
            return i
    raise AssertionError(f"{module}: {part} has no line in LAYERS")


def test_imports_of_cogvx_point_down():
    wrong = []
    for path in files("cogvx", ".py"):
        importer = name_of(path)
        if importer == "cogvx":
            continue
        for imported in imports(path):
            if imported == "cogvx" or not imported.startswith("cogvx."):
                continue
            same_package = imported.split(".")[1] == importer.split(".")[1]
            if not same_package and layer(imported) >= layer(importer):
                wrong.append(f"{importer} imports {imported}")
    assert not wrong


def test_imports_make_no_cycle():
    graph = {name_of(path): set(imports(path)) - {name_of(path)} for path in files("cogvx", ".py")}
    del graph["cogvx"]
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_the_operators_stand_alone():
    allowed = {"torch", "triton", "cogvx_kernels", *sys.stdlib_module_names}
    for path in files("cogvx_kernels", ".py"):
        tops = {module.split(".")[0] for module in imports(path)}
        assert tops <= allowed, path
        assert "triton" not in tops or path.name.startswith("_triton"), path


def test_operators_do_not_import_each_others_backends():
    for path in files("cogvx_kernels", ".py"):
        foreign = [m for m in imports(path) if m.split(".")[-1] in ("_native", "_triton", "_cuda")]
        assert not foreign, (path, foreign)


def test_the_packages_use_no_oracle_and_no_switch():
    for path in [*files("cogvx", ".py"), *files("cogvx_kernels", ".py")]:
        assert "diffusers" not in {module.split(".")[0] for module in imports(path)}, path
    for path in files("cogvx", ".py"):
        assert "triton" not in {module.split(".")[0] for module in imports(path)}, path
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "arg", None)
            assert name not in ("getenv", "environ", "use_fused"), f"{path}: {name}"


@pytest.mark.parametrize("name", OPS)
def test_one_name_five_places(name):
    places = [f"cogvx_kernels/{name}/{part}.py" for part in ("__init__", "reference", "cases")]
    places += [f"tests/kernels/test_{name}.py"]
    places += [f"cogvx_kernels/{name}/_{backend}.py" for backend in OPS[name].backends]
    if "native" in OPS[name].backends:
        places += [f"csrc/{name}/{part}" for part in (f"{name}.h", "bind.cpp", "cpu.cpp")]
        places += [f"benchmarks/bench_{name}.py"]
    if "cuda" in OPS[name].backends:
        places += [f"csrc/{name}/{part}" for part in (f"{name}.h", "bind.cpp", "cuda.cu")]
    assert not [place for place in places if not (ROOT / place).exists()]
    assert hasattr(torch.ops.cogvx, name)


def test_nothing_but_operators_has_an_operators_place():
    folders = [path for parent in ("cogvx_kernels", "csrc") for path in (ROOT / parent).iterdir() if path.is_dir()]
    names = {path.name for path in folders if not path.name.startswith("__")}
    assert names - {"common"} == set(OPS)


@pytest.mark.parametrize("folder", SOURCES)
def test_files_are_short_and_named_for_what_they_hold(folder):
    for path in files(folder, ".py", ".cpp", ".cu", ".cuh", ".h"):
        assert len(path.read_text().splitlines()) <= 400, path
        parts = {part.removesuffix(path.suffix) for part in path.relative_to(ROOT).parts}
        bad = parts & {"utils", "util", "helpers", "core", "base", "common", "misc"}
        common = [
            ROOT / "csrc" / "common",
            ROOT / "tests" / "host_cuda" / "include" / "common",
        ]  # one stands in for one
        assert not bad or (bad == {"common"} and path.parent in common), path


def test_the_extension_includes_nothing_of_torch():
    for path in files("csrc", ".cpp", ".cu", ".cuh", ".h"):
        includes = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
        assert not [line for line in includes if any(word in line for word in ("torch", "ATen", "c10"))], path


def test_the_operators_work_with_torch_alone():
    program = """
import sys
sys.modules["triton"] = sys.modules["cogvx_kernels._C"] = None  # as where they are not installed
import torch, cogvx_kernels
from cogvx_kernels.expert_layernorm.cases import SMALL
assert cogvx_kernels.expert_layernorm(*SMALL[0]()).isfinite().all()
reasons = cogvx_kernels.explain()["expert_layernorm"]
assert reasons["reference"] == "live" and reasons["native"] != "live" and "triton" in reasons["triton"], reasons
assert not [name for name in sys.modules if name == "cogvx" or name.startswith(("cogvx.", "numpy.random"))]
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
