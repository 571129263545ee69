"""The execution on the host finds bugs: each of these is planted in the real sources, and a small case must show it."""

import functools
import json
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import host_cuda
import pytest
import torch

from cogvx_kernels import _extension, use_backend
from cogvx_kernels._op import OPS
from cogvx_kernels.testing import assert_as_accurate

CSRC = host_cuda.HERE.parents[1] / "csrc"
SEEDS = 3  # orders of threads to try: one of each policy

# What is planted: the operator, the file, the text and what takes its place, everywhere in that file.
BUGS = {
    "a missing barrier": ("expert_layernorm", "common/vec.cuh", "__syncthreads();", ""),
    "a missing barrier of a warp": ("joint_attention", "joint_attention/tile.cuh", "__syncwarp();", ""),
    "a missing wait for copies": (
        "joint_attention",
        "joint_attention/tile.cuh",
        "wait_for_copies<kStages - 2>();",
        "",
    ),
    "halves of a fragment exchanged": (
        "joint_attention",
        "joint_attention/tile.cuh",
        "row + lane % 8 + lane / 16 * 8, piece + lane / 8 % 2",
        "row + lane % 8 + lane / 8 % 2 * 8, piece + lane / 16",
    ),
    "the last column taken for the border": (
        "causal_conv3d",
        "common/convolution.cuh",
        "s < args.width &&",
        "s < args.width - 1 &&",
    ),
    "a tile counted twice": (
        "causal_conv3d_moments",
        "causal_conv3d_moments/cuda.cu",
        "sum += f(part);",
        "sum += part == first ? 2 * f(part) : f(part);",
    ),
    "pixels outside the frame measured": (
        "causal_conv3d_moments",
        "common/convolution.cuh",
        "min(kRows, args.height - row)",
        "kRows",
    ),
    "a frame too early": (
        "causal_conv3d",
        "common/convolution.cuh",
        "next_t = b * a.frames_in + t + first - a.pad_t;",
        "next_t = b * a.frames_in + max(t - 1, 0) + first - a.pad_t;",
    ),
}


def planted(file: str, text: str, by: str) -> str:
    """The source with the bug in it."""
    original = (CSRC / file).read_text()
    assert text in original, f"{file} has no {text!r} any more"
    return original.replace(text, by)


def build_with_bug(op: str, file: str, text: str, by: str, folder: Path) -> Path:
    """The plain module with the operator's cuda.cu compiled against a changed header; the rest is linked as it is."""
    plain = host_cuda.build()
    changed = folder / file
    changed.parent.mkdir(parents=True)
    changed.write_text(planted(file, text, by))
    commands = json.loads((host_cuda.FOLDER / "compile_commands.json").read_text())
    source = CSRC / op / "cuda.cu"
    compiled = changed if file == f"{op}/cuda.cu" else source
    (command,) = (c for c in commands if "kernels_plain.dir" in c["output"] and Path(c["file"]) == source)
    target = folder / "changed.o"
    words = [word for word in shlex.split(command["command"]) if word not in (command["file"], "-c", "-MD")]
    words[words.index("-o") + 1] = str(target)
    words = [words[0], f"-I{folder}", *words[1:], "-c", str(compiled)]  # what is changed comes first
    subprocess.run(words, check=True, cwd=command["directory"])
    parts = ("kernels_plain.dir", "bindings.dir", "/plain.dir/")
    others = [c["output"] for c in commands if any(part in c["output"] for part in parts) and c is not command]
    # Of inline functions that several objects have, the linker takes the first: the changed ones.
    objects = [target, *(host_cuda.FOLDER / output for output in others)]
    module = folder / plain.name
    subprocess.run(["c++", "-shared", "-o", str(module), *map(str, objects)], check=True)
    return module


@pytest.mark.parametrize("bug", BUGS)
def test_what_is_planted_is_in_the_sources(bug):
    _, *change = BUGS[bug]
    planted(*change)


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, tmp_path):
    op, *change = BUGS[bug]
    path = build_with_bug(op, *change, tmp_path)
    assert not differs(op, host_cuda.build()), "the sources as they are must pass"
    assert differs(op, path), f"{bug} in {op} was not found"


@functools.cache
def differs(op: str, path: Path) -> bool:
    """Whether some small case fails or is wrong, in some order of threads."""
    machine, cases = host_cuda.Machine(path), import_module(f"cogvx_kernels.{op}.cases")
    dtype = OPS[op].dtypes("cuda")[0]
    with _extension.cuda_on_host(host_cuda.load(path)), use_backend("cuda"):
        for case in cases.SMALL:
            args = case(dtype=dtype)
            if OPS[op].why_not("cuda", *args) is not None:
                continue
            for seed in range(SEEDS):
                machine.seed(seed)
                try:
                    y = OPS[op]._overload(*args)
                except RuntimeError:
                    return True
                if is_wrong(op, args, y):
                    return True
    return False


def is_wrong(op: str, args: tuple, y: object) -> bool:
    reference = OPS[op].reference.forward
    eager, exact = reference(*args), reference(*(x.double() if torch.is_tensor(x) else x for x in args))
    largest = getattr(import_module(f"cogvx_kernels.{op}.cases"), "largest", lambda *_: None)(*args)
    as_parts = [part if isinstance(part, tuple) else (part,) for part in (y, eager, exact)]
    try:
        for one, other, truth in zip(*as_parts, strict=True):
            assert_as_accurate(one, other, truth, largest=largest)
    except AssertionError:
        return True
    return False
