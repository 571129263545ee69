"""Published checkpoint folders, read strictly and written atomically; never a pickle.

A pipeline's folder holds `model_index.json` and a folder for each component; a component's folder holds `config.json`
and safetensors, in one file or in shards with an index. A folder counts as hostile until its names, links, headers and
shapes are checked; no weight is read before that.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .on_disk import replacing
from .quantized import DTYPE, is_fp8, unscaled
from .stored import DTYPES, CheckpointError, Stored, one_line, opened, opened_file, some

TINY = Path(__file__).parent.parent / "assets" / "tiny"
TINY_I2V = TINY.with_name("tiny-i2v")
EMBEDDED = {"tiny": TINY, "tiny-i2v": TINY_I2V}
SHARED = ("vae", "text_encoder", "tokenizer")  # what the second one takes from the first, and frozen weights
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CODE = (".py", ".pyc", ".so", ".dll", ".dylib")
STEMS = ("diffusion_pytorch_model", "model")  # of weight files: diffusers' and ours, transformers'
VARIANT = re.compile(rf"(?:{'|'.join(STEMS)})\.(?:(\w+)\.safetensors|safetensors\.index\.(\w+)\.json)")
MAX_JSON_BYTES = 2**24  # the largest published one, a tokenizer's, has 2.4 MB


def resolve_folder(folder: str | Path) -> Path:
    """The local folder of a checkpoint: a path, a hub name (downloaded once), or the word for an embedded one."""
    if isinstance(folder, str) and folder in EMBEDDED:
        if not EMBEDDED[folder].is_dir():
            raise CheckpointError(
                f"{folder} is not inside this build; `make tiny` trains it, or give another checkpoint"
            )
        return EMBEDDED[folder]
    path = Path(folder)
    if str(folder) and os.path.isdir(path):
        return check_contents(path)
    if path.suffix in PICKLES:
        raise CheckpointError(_pickle_message(path))
    if os.path.isfile(path):
        raise CheckpointError(f"{path} is a file; a checkpoint is a folder, here perhaps {path.parent}")
    if not HUB_NAME.fullmatch(str(folder)) or ".." in str(folder) or str(folder).startswith("."):
        what = f"{str(folder)[:200]!r} is no folder"
        raise CheckpointError(f"{what}; give a checkpoint folder, a hub name like owner/name, tiny or tiny-i2v")
    from huggingface_hub import snapshot_download  # here, because it takes 0.4 s and few calls need it

    try:
        snapshot = Path(snapshot_download(str(folder), allow_patterns=HUB_FILES))
    except Exception as error:  # network, login, name: the library has some ten unrelated classes
        reason = one_line(error)
        raise CheckpointError(f"{folder} is no folder here and could not be had from the hub: {reason}") from error
    return check_contents(snapshot)


def check_contents(root: Path) -> Path:
    """`root`, once it and its components' folders are known to hold neither code nor pickles."""
    for folder in (root, *(root / component for component in COMPONENTS)):
        try:
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in CODE:
                what = "is code; a model here is data alone, and a folder that brings code is not loaded"
                raise CheckpointError(f"{folder / name} {what}. Look at what it does, then take it out of the folder")
            if suffix in PICKLES:
                raise CheckpointError(_pickle_message(folder / name))
    return root


def own_or_shared(root: Path, component: str) -> Path:
    """`root`/`component`, or the folder of the embedded checkpoint that the other embedded one takes it from."""
    return (TINY if root == TINY_I2V and component in SHARED else root) / component


def component_folder(root: Path, component: str) -> Path:
    """`root`/`component` of a pipeline's folder, or `root` itself where that is a component's folder."""
    if (folder := own_or_shared(root, component)).is_dir():
        return folder
    if (root / "config.json").is_file():
        return root
    raise CheckpointError(f"{root} is no checkpoint: it holds neither {component}/config.json nor config.json")


def checkpoint_files(root: Path) -> dict[str, Path]:
    """Every file of a checkpoint by its place in the folder, those included that an embedded one shares."""
    folders = {"": root} | ({f"{part}/": TINY / part for part in SHARED} if root == TINY_I2V else {})
    found = {
        prefix + path.relative_to(folder).as_posix(): path
        for prefix, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file()
    }
    return found | {f"transformer/frozen-{path.name}": path for path in frozen_weights(root / "transformer")}


def frozen_weights(folder: Path) -> list[Path]:
    """Files of weights that a component takes from another checkpoint where it has none of the same name itself."""
    return weight_files(TINY / "transformer", TINY) if folder == TINY_I2V / "transformer" else []


def safe_path(path: Path, root: Path) -> Path:
    """`path`, once its links are known to end inside `root` or in the blobs of the hub cache that `root` is part of."""
    try:
        real, allowed = path.resolve(), [root.resolve()]
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a link that leads nowhere: {one_line(error)}") from error
    if root == TINY_I2V:
        allowed.append(TINY.resolve())
    for ancestor in root.absolute().parents:
        if ancestor.name == "snapshots" and ancestor.parent.name.startswith("models--"):
            allowed.append(ancestor.parent.resolve() / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path} is a link that leaves its folder, to {real}")
    return path


def read_json(path: Path, root: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint."""
    if not safe_path(path, root).is_file():  # nor a pipe, which would never end
        raise CheckpointError(f"{path} is missing")
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are read")
        content = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object with fields")
    return content


def read_config(config_class: type, folder: Path, root: Path, name: str = "config.json") -> Any:
    content = read_json(folder / name, root)
    try:
        return config_class.from_dict(content)
    except ValueError as error:
        raise CheckpointError(f"{folder / name}: {one_line(error)}") from error


def weight_files(folder: Path, root: Path) -> list[Path]:
    """The safetensors files of a component, those of its index where there is one.

    Where there is a variant alone, such as `diffusion_pytorch_model.fp16.safetensors`, its files.
    """
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _indexed_files(index, root)
        if (folder / f"{stem}.safetensors").is_file():
            return [safe_path(folder / f"{stem}.safetensors", root)]
    variants = {}
    for path in sorted(folder.iterdir()):
        match = VARIANT.fullmatch(path.name)
        if match and path.is_file():
            variants.setdefault(match[1] or match[2], path)
    if len(variants) > 1:
        found = ", ".join(variants)
        raise CheckpointError(f"{folder} holds the variants {found} and no plain weights; leave one of them there")
    for path in variants.values():
        return _indexed_files(path, root) if path.suffix == ".json" else [safe_path(path, root)]
    raise CheckpointError(f"{folder} holds no weights: {STEMS[0]}.safetensors is missing")


def _indexed_files(index: Path, root: Path) -> list[Path]:
    places = read_json(index, root).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map")
    if not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has a weight_map whose values are not all file names")
    files = []
    for name in sorted(set(places.values())):
        if Path(name).suffix in PICKLES:
            raise CheckpointError(_pickle_message(index.parent / name[-100:]))
        if not re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", name):
            raise CheckpointError(f"{index} names the shard {name[:100]!r}; a shard is a safetensors file beside it")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names the shard {name}, which is missing")
        files.append(safe_path(index.parent / name, root))
    return files


def load_weights(
    model: nn.Module,  # on the meta device
    folder: Path,
    root: Path,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    aliases: dict[str, str] | None = None,
    keep_fp32: Iterable[str] = (),
) -> None:
    """Give a model the weights of a folder, cast to `dtype`, once every name and shape is right.

    Args:
        dtype: None is what is stored, and bf16 for fp8.
        aliases: other names under which a file may hold a tensor.
        keep_fp32: tensors that become fp32 where the others become fp16; those that are stored in fp16 stay so.
    """
    check_dtype(dtype)
    check_device(device)
    with opened(weight_files(folder, root)) as own, opened(frozen_weights(folder)) as frozen:
        names = {name for name, _ in own}
        stored = [*own, *(pair for pair in frozen if pair[0] not in names)]
        dtype = DTYPE if dtype is None and is_fp8(stored) else dtype
        fill(model, unscaled(stored), folder, dtype, device, aliases or {}, keep_fp32)


def fill(
    model: nn.Module,  # on the meta device
    stored: Iterable[tuple[str, Stored]],
    source: Path,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    aliases: dict[str, str],
    keep_fp32: Iterable[str] = (),
) -> None:
    """`load_weights` from tensors that a file holds; `source` is what errors name."""
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted_ones = {name: shape for name, shape in expected.items() if name not in aliases}
    places, keep = _check_tensors(stored, wanted_ones, aliases, source), set(keep_fp32)
    weights: dict[str, Tensor] = {}
    for name, place in places.items():
        tensor = place.read()
        wanted = dtype or tensor.dtype
        if name in keep and wanted == torch.float16 != tensor.dtype:
            wanted = torch.float32
        # A copy: a mapped file that is overwritten later would take the process down.
        weights[name] = tensor.to(check_device(device), wanted, copy=True)
    model.load_state_dict(weights | {a: weights[name] for a, name in aliases.items() if a in expected}, assign=True)


def load_tensors(file: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in one safetensors file and the words that were stored with them."""
    file = Path(file)
    if file.suffix in PICKLES:
        raise CheckpointError(_pickle_message(file))
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; give a safetensors file")
    with opened_file(file) as tensors:
        return {name: tensors.get_tensor(name).clone() for name in sorted(tensors.keys())}, tensors.metadata() or {}


def save_tensors(tensors: dict[str, Tensor], file: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file: complete or not there, however the process ends."""
    file = Path(file)
    try:
        with replacing(file) as partial:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise CheckpointError(f"{file} cannot be written: {reason}") from error


def _check_tensors(
    stored: Iterable[tuple[str, Stored]], expected: dict[str, list[int]], aliases: dict[str, str], source: Path
) -> dict[str, Stored]:
    """The tensor of each name. Raises CheckpointError that says what is missing, extra or wrong."""
    places: dict[str, Stored] = {}
    seen, extra, shapes, dtypes = set(), [], [], []
    for key, tensor in stored:
        name = aliases.get(key, key)
        if name not in expected or key in seen:
            extra.append(key)
            continue
        if tensor.shape != expected[name]:
            shapes.append(f"{key} is {tensor.shape}, not {expected[name]}")
        if tensor.dtype not in DTYPES:
            dtypes.append(f"{key} is {tensor.dtype}")
        places[name] = tensor
        seen.add(key)
    faults = (
        ("missing", sorted(expected.keys() - places.keys())),
        ("too many", sorted(extra)),
        ("of another shape", shapes),
        (f"of a type other than {', '.join(DTYPES)}", dtypes),
    )
    if any(names for _, names in faults):
        raise CheckpointError(f"{source}: " + "; ".join(f"{len(n)} {what} ({some(n)})" for what, n in faults if n))
    return places


def check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; it must be None or one of {', '.join(map(str, DTYPES.values()))}")


def check_device(device: torch.device | str | None) -> torch.device:
    try:
        return torch.device(device or "cpu")
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; it must be a device of torch, such as cpu or cuda") from error


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run any code when it is read; only safetensors files are loaded. "
        f"Of a SAT file, this makes what can be: cogvx convert {path.name} OUTPUT --to diffusers (a LoRA: --to lora)"
    )
