"""Writing of checkpoint folders: complete or not there, however the process ends."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .checkpoint import STEMS, CheckpointError, checkpoint_files
from .eight_bits import refuse_to_save
from .on_disk import sync

SHARD_BYTES = 10**10
PARTS = (".json", ".model", ".safetensors")  # of a checkpoint folder


def save_model(
    model: nn.Module, folder: str | Path, shard_bytes: int = SHARD_BYTES, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a model with a `config` of ours as a component's folder. An earlier checkpoint there is replaced.

    weights: by name, in the place of the model's own.

    Raises ValueError for weights in 8 bits, and CheckpointError as `new_folder` does.
    """
    refuse_to_save(model)
    with new_folder(folder) as partial:
        write_component(partial, weights or model.state_dict(), model.config.to_dict(), STEMS[0], shard_bytes)


def write_component(
    folder: Path, weights: dict[str, Tensor], config: dict[str, Any], stem: str, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `config.json` and the weights, in shards with an index where they exceed `shard_bytes`."""
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; it must be at least 1")
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in weights.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor.detach().contiguous()
        room -= tensor.nbytes
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": places}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    write_json(folder / "config.json", config)
    for file, shard in zip(names, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # the library makes files that only their owner can read


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` to write into; it takes that name once all of it is on the disk.

    On any error it is removed and what was at `folder` stays. An empty folder or an earlier checkpoint is replaced, a
    folder that holds anything else never.

    Raises:
        CheckpointError: `folder` cannot be written, or holds something that is no checkpoint.
    """
    folder = Path(folder)
    _check_replaceable(folder)
    partial = None
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = folder.absolute().with_name(f".{folder.absolute().name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        _replace(folder, partial)
        sync(folder.absolute().parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise CheckpointError(f"{folder} cannot be written: {reason}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def content_hash(folder: str | Path) -> str:
    """SHA-256, in hexadecimal, of the names and contents of a checkpoint's weights, configs and vocabulary."""
    digest, files = hashlib.sha256(), checkpoint_files(Path(folder))
    names = (Path(name) for name in files if Path(name).suffix in PARTS)
    for name in sorted(n for n in names if not any(part.startswith(".") for part in n.parts)):
        with open(files[name.as_posix()], "rb") as file:
            digest.update(f"{name.as_posix()}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _check_replaceable(folder: Path) -> None:
    if not folder.is_dir():
        if folder.exists():
            raise CheckpointError(f"{folder} is a file; a checkpoint is written as a folder")
        return
    names = {path.name for path in folder.iterdir()}
    if names and not names & {"config.json", "model_index.json", "tokenizer_config.json"}:
        raise CheckpointError(f"{folder} holds {sorted(names)[0]} and no checkpoint; give a new or an empty folder")
    foreign = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in PARTS]
    if foreign:
        raise CheckpointError(f"{folder} holds {foreign[0].relative_to(folder)} too; give a new or an empty folder")


def _replace(folder: Path, partial: Path) -> None:
    try:
        os.rename(partial, folder)  # also onto an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        old = partial.with_name(partial.name.replace(".partial-", ".old-"))
        os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
