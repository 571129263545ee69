"""Training state on disk: safetensors and JSON, written to a temporary folder and renamed."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save_state(folder: Path, step: int, trees: dict[str, dict]) -> None:
    """Write `trees` (nested dicts, lists, tensors, numbers) as `folder`/step-NNNNNNN; earlier steps go then."""
    final = folder / f"step-{step:07d}"
    partial = folder / f"partial-{step:07d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tree in trees.items():
        tensors: dict[str, torch.Tensor] = {}
        (partial / f"{name}.json").write_text(json.dumps(_flatten(tree, "", tensors)))
        save_file(tensors, partial / f"{name}.safetensors")
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(folder)
    for old in folder.glob("step-*"):
        if old != final:
            shutil.rmtree(old)


def load_state(folder: Path) -> tuple[int, dict[str, dict]] | None:
    """The newest whole state under `folder` as (step, trees), or None; partial folders are removed."""
    for partial in folder.glob("partial-*"):
        shutil.rmtree(partial)
    whole = sorted(folder.glob("step-*"))
    if not whole:
        return None
    trees = {}
    for file in whole[-1].glob("*.json"):
        trees[file.stem] = _unflatten(json.loads(file.read_text()), load_file(file.with_suffix(".safetensors")))
    return int(whole[-1].name.removeprefix("step-")), trees


def restore(folder: Path, parts: dict) -> int:
    """Load the newest state of a run into its parts; the step that it had reached."""
    state = load_state(folder)
    if state is None:
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[1][name])
    return state[0]


def _flatten(tree, path: str, tensors: dict[str, torch.Tensor]):
    """The tree with each tensor moved to `tensors` and a reference left in its place."""
    if isinstance(tree, torch.Tensor):
        tensors[path] = tree.detach().contiguous().clone()
        return {"tensor": path}
    if isinstance(tree, dict):
        # Pairs, because an optimiser's state has integer keys and JSON has none.
        return {"pairs": [[key, _flatten(value, f"{path}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_flatten(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]
    return tree


def _unflatten(tree, tensors: dict[str, torch.Tensor]):
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {key: _unflatten(value, tensors) for key, value in tree["pairs"]}
    if isinstance(tree, list):
        return [_unflatten(value, tensors) for value in tree]
    return tree


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
