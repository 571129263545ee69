"""Files of the official training code (SAT): pickles, so read on request alone, and nothing but tensors of them."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import check_dtype
from .loading import CONFIGS, ConfigLike, Loaded, pick_config, take
from .names import find, to_sat
from .on_disk import replacing
from .stored import DTYPES, CheckpointError, Stored, one_line

PICKLED = (".pt", ".pth", ".ckpt", ".bin")
WRAPPERS = ("model", "module", "state_dict")  # in this order, one inside the other, as the official converters do it
PREFIXES = {"transformer": "model.diffusion_model.", "vae": ""}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def load_sat(
    model_classes: Mapping[str, type[nn.Module]],
    file: Path,
    component: str | None = None,
    config: ConfigLike = None,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """The transformer or VAE in a SAT file, and the names in it that have no place in the model."""
    check_dtype(dtype)
    stored = [(name, described(tensor)) for name, tensor in read_pickle(file).items()]
    found = find((name for name, _ in stored), component, file)
    known = pick_config(found.component, config, {}, stored, found, file)
    return take(model_classes[found.component], known, stored, found, file, dtype, None)


def described(tensor: Tensor) -> Stored:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in NAMES
    kind = NAMES[tensor.dtype] if plain else f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
    return Stored(list(tensor.shape), kind, tensor.detach)


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The named tensors in a file of torch's, of which nothing else is accepted: no code of it can run."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; give a SAT file, such as mp_rank_00_model_states.pt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive(file))
    except UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors, which could run any code, and is not read: {one_line(error)}"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{file} is no intact file of torch: {one_line(error)}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not named tensors")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{file} holds no named tensors")
    return tensors


def is_archive(file: Path) -> bool:
    with open(file, "rb") as content:
        return content.read(4) == b"PK\x03\x04"


def save_sat(model: nn.Module, file: str | Path) -> None:
    """Write a transformer or VAE as SAT does: complete or not there, however the process ends."""
    component = next(name for name, config in CONFIGS.items() if isinstance(model.config, config))
    weights = to_sat(component, {name: tensor.detach() for name, tensor in model.state_dict().items()})
    named = {PREFIXES[component] + name: alone(tensor) for name, tensor in weights.items()}
    write_pickle({"module": named} if component == "transformer" else {"state_dict": named}, Path(file))


def alone(tensor: Tensor) -> Tensor:
    """The tensor without what else its memory holds: torch would store that too."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def write_pickle(content: Any, file: Path) -> None:
    try:
        with replacing(file) as partial, open(partial, "xb") as written:
            torch.save(content, written)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise CheckpointError(f"{file} cannot be written: {reason}") from error
