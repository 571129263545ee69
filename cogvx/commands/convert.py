"""cogvx convert: write a transformer, a VAE or a LoRA in another format."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ._arguments import DType

if TYPE_CHECKING:
    from torch import nn

    from ..models.loading import Loaded

SUFFIXES = {"single": ".safetensors", "sat": ".pt", "lora": ".safetensors"}


def main(
    source: Annotated[Positional[Path], arg(metavar="SOURCE")],
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")],
    to: Literal["diffusers", "single", "sat", "lora"],
    component: Literal["transformer", "vae"] | None = None,
    config: str | None = None,
    dtype: DType | None = None,
    alpha: float | None = None,
) -> None:
    """Write a transformer or VAE as a diffusers folder, as one safetensors file, or as SAT, the training code, does.

    Tensors keep every byte unless a dtype is given. What has no place in the other format is listed.

    Args:
        source: a checkpoint folder, a safetensors or GGUF file, or a SAT file (.pt), of which tensors alone are read.
        output: a folder for diffusers, a .safetensors or a .pt file; must not exist yet.
        to: the format to write; "lora" is a LoRA, of any naming, in diffusers'.
        component: which part, where the source holds both.
        config: of a file that does not say it: 2b, 5b, 5b-i2v, 1.5-5b, 1.5-5b-i2v, or a checkpoint's folder.
        dtype: unset, the stored one.
        alpha: of a LoRA that does not say it; unset, 1 for those of SAT, else the rank.
    """
    from ..models import CheckpointError

    if to != "diffusers" and output.suffix != SUFFIXES[to]:
        raise CheckpointError(f"output is {output}; for {to} its name must end in {SUFFIXES[to]}")
    if output.exists():
        raise CheckpointError(f"{output} exists; give a new name")
    if not output.absolute().parent.is_dir():
        raise CheckpointError(f"cannot write {output}: there is no folder {output.absolute().parent}")
    if to == "lora":
        return convert_lora(source, output, alpha)
    try:
        loaded = load(source, component, config, dtype)
    except ValueError as error:  # of a config that is none
        raise CheckpointError(str(error)) from error
    write(loaded.model, output, to)
    tensors = loaded.model.state_dict().values()
    print(f"{output}  {len(tensors)} tensors, {sum(t.nbytes for t in tensors) / 2**20:,.1f} MiB")
    list_left_out(loaded.left_out)


def convert_lora(source: Path, output: Path, alpha: float | None) -> None:
    from ..models.checkpoint import load_tensors
    from ..models.lora import write_lora
    from ..models.lora_names import SAT, pairs
    from ..models.sat import PICKLED, read_pickle

    pickled = source.suffix in PICKLED
    tensors, metadata = (read_pickle(source), {}) if pickled else load_tensors(source)
    left_out = [name for name in tensors if pickled and not SAT.fullmatch(name)]
    layers = pairs({n: t for n, t in tensors.items() if n not in left_out}, metadata, alpha, source)
    write_lora(layers, output)
    print(f"{output}  a LoRA of {len(layers)} layers")
    list_left_out(left_out)


def list_left_out(names: list[str]) -> None:
    for name in names:
        print(f"left out  {''.join(letter if letter.isprintable() else '?' for letter in name)}")


def load(source: Path, component: str | None, config: str | None, dtype: str | None) -> "Loaded":
    """The one model in a file or folder, with the names that have no place in it."""
    from ..models import CausalVAE, CheckpointError, ExpertTransformer
    from ..models.loading import FILES, Loaded, content_of, load_file
    from ..models.names import find
    from ..models.sat import PICKLED, load_sat
    from ._arguments import torch_dtype

    classes, kind = {"transformer": ExpertTransformer, "vae": CausalVAE}, torch_dtype(dtype)
    if source.suffix in PICKLED:
        return load_sat(classes, source, component, config, kind)
    if source.suffix in FILES and source.is_file():
        with content_of(source) as (stored, _):
            component = find((name for name, _ in stored), component, source).component
        return load_file(classes[component], component, source, kind, None, config)
    if config is not None:
        raise CheckpointError(f"config is {config!r}, but {source} is no single file; a folder has its own")
    part = component or which(source)
    model = classes[part].from_pretrained(source, dtype=kind)
    return Loaded(model, other_parts(source, part))


def which(source: Path) -> str:
    """The part whose folder this is. Raises CheckpointError for a folder that has several."""
    from ..config import TransformerConfig, VAEConfig
    from ..models import CheckpointError
    from ..models.checkpoint import read_json, resolve_folder

    root = resolve_folder(source)
    if not (root / "config.json").is_file():
        parts = [name for name in ("transformer", "vae") if (root / name).is_dir()]
        if len(parts) == 1:
            return parts[0]
        raise CheckpointError(f"{source} holds {' and '.join(parts) or 'no part'}; say --component transformer or vae")
    name = read_json(root / "config.json", root).get("_class_name")
    for part, config in (("transformer", TransformerConfig), ("vae", VAEConfig)):
        if name in config.class_names:
            return part
    raise CheckpointError(f"{root / 'config.json'} is of a {name!r}; converted are transformers and VAEs")


def other_parts(source: Path, part: str) -> list[str]:
    """The other folders of a pipeline's folder: none of the formats has a place for them beside this part."""
    if not (source / part).is_dir():
        return []
    return sorted(f"{path.name}/" for path in source.iterdir() if path.is_dir() and path.name != part)


def write(model: "nn.Module", output: Path, to: str) -> None:
    from ..models.loading import save_single
    from ..models.sat import save_sat

    if to == "diffusers":
        model.save_pretrained(output)
    elif to == "single":
        save_single(model, output)
    else:
        save_sat(model, output)
