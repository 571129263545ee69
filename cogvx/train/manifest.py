"""The list of a saved folder's files with their SHA-256, which finds every damaged, missing or foreign one."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..models.checkpoint import CheckpointError

NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a saved folder says of itself."""

    step: int
    score: float | None  # what "best" goes by, lower is better; None where nothing was measured
    files: dict[str, str]  # name to SHA-256, in hexadecimal


def seal(folder: Path, step: int, score: float | None = None) -> None:
    """Write the manifest of the files in `folder`; nothing may be changed there afterwards."""
    files = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.name != NAME}
    (folder / NAME).write_text(_text(Manifest(step, score, files)))


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, intact. Raises CheckpointError that names what is wrong."""
    path = folder / NAME
    try:
        text = path.read_text()
        content = json.loads(text)["manifest"]
        manifest = Manifest(content["step"], content["score"], content["files"])
        # Written anew from what was read, it is the same text but where a bit of it has changed, in a space too.
        intact = _text(manifest) == text
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {NAME}, so nothing says whether it is whole") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not intact:
        raise CheckpointError(f"{path} is damaged: it is not as it was written")
    return manifest


def verify(folder: Path) -> Manifest:
    """The manifest of a folder whose every file is as it was saved. Raises CheckpointError naming one that is not."""
    manifest = read_manifest(folder)
    present = {path.name for path in folder.iterdir()} - {NAME}
    for what, names in (
        ("is missing", manifest.files.keys() - present),
        ("does not belong there", present - manifest.files.keys()),
    ):
        if names:
            raise CheckpointError(f"{folder / min(names)} {what}, so this saved state is not as it was written")
    for name, digest in manifest.files.items():
        try:
            found = _digest(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from error
        if found != digest:
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is {found[:12]}..., not {digest[:12]}...")
    return manifest


def _text(manifest: Manifest) -> str:
    content = json.dumps(asdict(manifest), sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    whole = {"format": FORMAT, "manifest": json.loads(content), "sha256": digest}
    return json.dumps(whole, indent=2, sort_keys=True) + "\n"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
