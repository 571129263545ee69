"""Training state on disk: complete or not there, however the process ends, and checked when it is read.

A state is a folder `step-0000100` of safetensors and JSON, a pair for each part (model, optimiser, ...), with a
manifest of SHA-256 sums. It is written under another name, brought to the disk and renamed.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..models.checkpoint import CheckpointError
from ..models.on_disk import sync
from .manifest import NAME, read_manifest, seal, verify

PARTIAL, REPLACED, STEP = "partial-", "replaced-", "step-"


def save_state(
    folder: Path,
    step: int,
    trees: Mapping[str, dict],
    keep_last: int = 1,
    keep_best: int = 0,
    score: float | None = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write `trees` (nested dicts, lists, tensors, numbers, text) as `folder`/step-NNNNNNN.

    Of all states the last `keep_last` stay, this one counted, and the `keep_best` of lowest `score`. `beside` writes
    files of its own into the folder that it is given: an adapter, a config.

    Raises CheckpointError where it cannot be written, on a full disk or in a folder that is read-only; every earlier
    state is then as it was.
    """
    with Saver() as saver:
        saver.save(folder, step, trees, keep_last, keep_best, score, beside)


class Saver:
    """Writes states while training goes on: `with Saver() as saver: ... saver.save(folder, step, trees)`.

    A call copies the state, and returns before it is on the disk; it first waits until the state before is, and so does
    the end of the block. Both raise what `save_state` raises, of the state before.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        folder: Path,
        step: int,
        trees: Mapping[str, dict],
        keep_last: int = 1,
        keep_best: int = 0,
        score: float | None = None,
        beside: Callable[[Path], None] | None = None,
        copy: bool = True,
    ) -> None:
        """As `save_state`; without `copy` the trees are written as they are, and nothing may change them any more."""
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last is {keep_last} and keep_best {keep_best}; at least 1 and 0 states are kept")
        if score is not None and not math.isfinite(score):
            raise ValueError(f"score is {score}; it must be a finite number")
        self.wait()
        partial = folder / f"{PARTIAL}{step:07d}"
        copied: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}
        with _written(folder, step, partial):
            for name, tree in trees.items():
                tensors: dict[str, torch.Tensor] = {}
                copied[name] = json.dumps(_flatten(tree, name, tensors, copy)), tensors
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if beside is not None:  # now, since it reads what the next step changes
                beside(partial)

        def write() -> None:
            try:
                with _written(folder, step, partial):
                    _write(folder, step, partial, copied, score)
                prune(folder, keep_last, keep_best)
            except BaseException as error:  # for whoever waits
                self._error = error

        self._thread = Thread(target=write, name=f"state of step {step}")
        self._thread.start()

    def wait(self) -> None:
        """Until all states are on the disk."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # the error on its way says more
            self._thread.join()


@contextmanager
def _written(folder: Path, step: int, partial: Path) -> Iterator[None]:
    """What goes wrong while a state is written, as CheckpointError; nothing of that state is left then."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise CheckpointError(f"the state of step {step} cannot be written to {folder}: {reason}") from error


def _write(folder: Path, step: int, partial: Path, copied: Mapping[str, tuple[str, dict]], score: float | None) -> None:
    for name, (text, tensors) in copied.items():
        (partial / f"{name}.json").write_text(text)
        save_file(tensors, partial / f"{name}.safetensors")
    seal(partial, step, score)
    for file in [*partial.iterdir(), partial]:
        sync(file)
    _take_place(partial, folder / f"{STEP}{step:07d}")


def load_state(folder: Path, step: int | None = None) -> tuple[int, dict[str, dict]] | None:
    """The newest state under `folder`, or that of a step, as (step, trees), or None where there is none.

    What a killed process left unfinished is removed. Raises CheckpointError for a state that was changed since it was
    saved, which names the file and what to do.
    """
    clean(folder)
    found = steps(folder)
    if not found or (step is not None and step not in found):
        return None
    step = found[-1] if step is None else step
    path = folder / f"{STEP}{step:07d}"
    try:
        manifest = verify(path)
        if manifest.step != step:
            raise CheckpointError(f"{path} holds the state of step {manifest.step}")
    except CheckpointError as error:
        earlier = [s for s in found if s < step]
        advice = f"remove {path} to go on from step {earlier[-1]}" if earlier else "there is no earlier state"
        raise CheckpointError(f"{error}; {advice}") from error
    return step, {name: _read(path / name) for name in _parts(manifest.files)}


def restore(folder: Path, parts: Mapping) -> int:
    """Load the newest state of a run into its parts; the step that it had reached.

    Raises CheckpointError for a damaged state, and for one that was saved with other parts.
    """
    state = load_state(folder)
    if state is None:
        return 0
    step, trees = state
    absent, foreign = sorted(parts.keys() - trees.keys()), sorted(trees.keys() - parts.keys())
    if absent or foreign:
        what = f"has no {', '.join(absent)}" if absent else f"holds {', '.join(foreign)}, which this run has not"
        raise CheckpointError(f"the state of step {step} in {folder} {what}; it is that of another kind of run")
    for name, part in parts.items():
        try:
            part.load_state_dict(trees[name])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{name} of step {step} in {folder} does not fit this run: {reason}") from error
    return step


def steps(folder: Path) -> list[int]:
    """The steps that have a state, in order."""
    names = (path.name.removeprefix(STEP) for path in folder.glob(f"{STEP}*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def prune(folder: Path, keep_last: int, keep_best: int) -> None:
    """Remove all states but the last and the best ones; a damaged one has no score."""
    found, scores = steps(folder), {}
    for step in found if keep_best else ():
        try:
            score = read_manifest(folder / f"{STEP}{step:07d}").score
        except CheckpointError:
            continue
        if score is not None:
            scores[step] = score
    best = sorted(scores, key=lambda step: (scores[step], -step))[:keep_best]
    for step in set(found[:-keep_last]) - set(best):
        # Under another name first: a folder that is half removed must not pass for a state.
        doomed = folder / f"{PARTIAL}{step:07d}"
        shutil.rmtree(doomed, ignore_errors=True)
        (folder / f"{STEP}{step:07d}").rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what a killed process left unfinished."""
    for partial in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)
    for replaced in folder.glob(f"{REPLACED}*"):
        final = folder / replaced.name.replace(REPLACED, STEP)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:  # killed between the two renames
            replaced.rename(final)


def _take_place(partial: Path, final: Path) -> None:
    """Rename a finished folder; a state of the same step is there until then."""
    replaced = final.with_name(final.name.replace(STEP, REPLACED))
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _parts(files: Mapping[str, str]) -> list[str]:
    """Names of the trees among the files: those with a JSON and a safetensors file."""
    stems = (name.removesuffix(".json") for name in files if name.endswith(".json") and name != NAME)
    return [stem for stem in stems if f"{stem}.safetensors" in files]


def _read(path: Path) -> dict:
    return _unflatten(json.loads(path.with_name(f"{path.name}.json").read_text()),
                      load_file(path.with_name(f"{path.name}.safetensors")))  # fmt: skip


def _flatten(tree, path: str, tensors: dict[str, torch.Tensor], copy: bool):
    """The tree with each tensor moved to `tensors` and a reference left in its place."""
    if isinstance(tree, torch.Tensor):
        name = path if path not in tensors else f"{path}#{len(tensors)}"
        tensors[name] = tree.detach().to("cpu", copy=copy).contiguous()
        return {"tensor": name}
    if isinstance(tree, dict):
        # Pairs, because an optimiser's state has integer keys and JSON has none.
        return {"pairs": [[key, _flatten(value, f"{path}/{key}", tensors, copy)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_flatten(value, f"{path}/{i}", tensors, copy) for i, value in enumerate(tree)]
    if tree is not None and not isinstance(tree, int | float | str):
        raise ValueError(f"{path} is a {type(tree).__name__}; a state holds dicts, lists, tensors, numbers and text")
    return tree


def _unflatten(tree, tensors: dict[str, torch.Tensor]):
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {key: _unflatten(value, tensors) for key, value in tree["pairs"]}
    if isinstance(tree, list):
        return [_unflatten(value, tensors) for value in tree]
    return tree
