"""cogvx verify: check a checkpoint folder."""

import gc
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..settings import Configs

HUB_RECORDS = Path(".cache/huggingface/download")  # in a folder that `hf download --local-dir` has made
PROMPTS = ["a red circle moves left on a black background", ""]

Outcome = tuple[str, bool | None, str]  # what was checked, whether it passed (None: not done), a figure or a reason


def main(
    folder: Annotated[Positional[str], arg(metavar="FOLDER")], parity: bool = True, device: str | None = None
) -> None:
    """Check a checkpoint: names and shapes, a finite forward pass, and parity with diffusers if installed.

    The SHA-256 of each file of weights is printed, and compared with what the hub said of it at the download, where
    that is on the disk: in the hub's cache, and in a folder that `hf download --local-dir` has made.

    All else is computed in fp32 at small sizes, one component at a time: the memory needed is that of the largest, 4
    bytes a parameter. Status 2 if any check fails.

    Args:
        folder: a checkpoint folder, a hub name, "tiny" or "tiny-i2v".
        parity: compare with diffusers too.
        device: unset, a GPU where there is one.
    """
    import torch

    from ..machine import pick_device
    from ..models import CheckpointError
    from ..models.checkpoint import checkpoint_files, resolve_folder
    from ..settings import read_configs

    configs, root = read_configs(folder), resolve_folder(folder)
    picked = pick_device(device)
    torch.backends.cudnn.allow_tf32 = False  # by default a GPU's convolutions in fp32 round to 10 bits first
    failed = []
    for name, path in sorted(checkpoint_files(root).items()):
        if path.suffix == ".safetensors":
            found, recorded = sha256(path), recorded_hash(root, name)
            verdict = {None: "", found: "  ok, as downloaded"}.get(recorded, f"  FAILED, downloaded was {recorded}")
            print(f"sha-256  {found}  {name}{verdict}", flush=True)
            failed += [f"{name}: SHA-256"] if recorded not in (None, found) else []
    for part in (TransformerCheck, VAECheck, TextCheck):
        for check, passed, text in outcomes(part(root, configs, picked), parity):
            word = {True: "ok", False: "FAILED", None: "skipped"}[passed]
            print(f"{word:8} {check:36}  {text}", flush=True)
            failed += [check] if passed is False else []
    if failed:
        raise CheckpointError(f"{folder} failed: {', '.join(failed)}")
    print(f"{folder}: all well")


def outcomes(part: "Check", parity: bool) -> Iterator[Outcome]:
    """The checks of one component, each as soon as it is done."""
    import torch

    from ..finite import NonFiniteError, check_finite
    from ..models import CheckpointError

    try:
        model = part.load()
    except CheckpointError as error:
        yield f"{part.name}: names and shapes", False, str(error)
        return
    module = getattr(model, "model", model)  # a text encoder holds its network
    sizes = [tensor.numel() for tensor in module.parameters()]
    yield f"{part.name}: names and shapes", True, f"{len(sizes)} tensors, {sum(sizes):,} parameters"
    run = torch.inference_mode()(partial(part.run, model))
    ours = run()
    try:
        for output in ours:
            check_finite(output, "a small pass", module, run)
    except NonFiniteError as error:
        yield f"{part.name}: finite values", False, str(error)
        return
    yield f"{part.name}: finite values", True, f"{sum(output.numel() for output in ours):,} values"
    del model, module, run
    gc.collect()
    if not parity or importlib.util.find_spec("diffusers") is None:
        yield f"{part.name}: parity with diffusers", None, "diffusers is not installed" if parity else "not asked for"
        return
    yield (f"{part.name}: parity with diffusers", *compare(part, ours))


def compare(part: "Check", ours: "list[Tensor]") -> tuple[bool | None, str]:
    import torch

    diffusers, transformers = importlib.import_module("diffusers"), importlib.import_module("transformers")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with torch.inference_mode():
            theirs = part.run_theirs(diffusers, transformers)
    except MissingPackageError as error:
        return None, " ".join(str(error).split())[:200]
    shapes = [[tuple(x.shape) for x in results] for results in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return False, f"shapes {shapes[0]}, in diffusers {shapes[1]}"
    error = max(((a - b).double().norm() / b.double().norm()).item() for a, b in zip(ours, theirs, strict=True))
    return error <= part.limit, f"relative error {error:.1e}, at most {part.limit:.0e}"


class MissingPackageError(ImportError):
    """What diffusers does not install by itself and needs for this folder."""


class Check:
    """One component: how it is loaded, what it computes on small inputs, and the same in diffusers."""

    name: str
    limit: float  # of the relative error against diffusers, in fp32

    def __init__(self, root: Path, configs: "Configs", device: "torch.device"):
        self.root, self.configs, self.device = root, configs, device

    def load(self) -> Any:
        raise NotImplementedError

    def run(self, model: Any) -> "list[Tensor]":
        raise NotImplementedError

    def run_theirs(self, diffusers: Any, transformers: Any) -> "list[Tensor]":
        raise NotImplementedError

    def load_theirs(self, model_class: Any) -> Any:
        import torch

        from ..models.checkpoint import component_folder

        folder = component_folder(self.root, self.name)
        model = model_class.from_pretrained(folder, torch_dtype=torch.float32)
        return model.eval().to(self.device)

    def draw(self, *shape: int) -> "Tensor":
        import torch

        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)


class TransformerCheck(Check):
    name, limit = "transformer", 1e-5

    def load(self) -> Any:
        import torch

        from ..models import ExpertTransformer

        return ExpertTransformer.from_pretrained(self.root, torch.float32, self.device)

    def load_theirs(self, model_class: Any) -> Any:
        import torch

        from ..models.checkpoint import frozen_weights

        if not frozen_weights(self.root / self.name):
            return super().load_theirs(model_class)
        with TemporaryDirectory() as whole:
            self.load().save_pretrained(whole)
            return model_class.from_pretrained(whole, torch_dtype=torch.float32).eval().to(self.device)

    def inputs(self) -> "tuple[Tensor, Tensor, Tensor]":
        import torch

        config = self.configs.transformer
        latents = self.draw(1, config.in_channels, 3, 4 * config.patch_size, 6 * config.patch_size)
        text = self.draw(1, config.max_text_seq_length, config.text_embed_dim)
        return latents, text, torch.tensor([500], device=self.device)

    def run(self, model: Any) -> "list[Tensor]":
        return [model(*self.inputs())]

    def run_theirs(self, diffusers: Any, transformers: Any) -> "list[Tensor]":
        model, rotary = self.load_theirs(diffusers.CogVideoXTransformer3DModel), None
        latents, text, timestep = self.inputs()
        if self.configs.transformer.use_rotary_positional_embeddings:
            pipeline = diffusers.CogVideoXPipeline(None, None, None, model, None)
            height, width = (8 * size for size in latents.shape[3:])
            rotary = pipeline._prepare_rotary_positional_embeddings(height, width, 3, self.device)
        v = model(latents.transpose(1, 2), text, timestep, image_rotary_emb=rotary, return_dict=False)[0]
        return [v.transpose(1, 2)]


class VAECheck(Check):
    name, limit = "vae", 1e-4

    def load(self) -> Any:
        import torch

        from ..models import CausalVAE

        return CausalVAE.from_pretrained(self.root, torch.float32, self.device)

    def inputs(self) -> "tuple[Tensor, Tensor]":
        return self.draw(1, self.configs.vae.latent_channels, 5, 4, 6), self.draw(1, 3, 17, 32, 48).clamp(-1, 1)

    def run(self, model: Any) -> "list[Tensor]":
        z, video = self.inputs()
        return [model.decode(z[:, :, :1]), model.decode(z), model.encode(video).mode()]

    def run_theirs(self, diffusers: Any, transformers: Any) -> "list[Tensor]":
        model, (z, video) = self.load_theirs(diffusers.AutoencoderKLCogVideoX), self.inputs()
        return [model.decode(z[:, :, :1]).sample, model.decode(z).sample, model.encode(video).latent_dist.mean]


class TextCheck(Check):
    name, limit = "text_encoder", 1e-5

    def load(self) -> Any:
        import torch

        from ..models.text import TextEncoder

        length = self.configs.transformer.max_text_seq_length
        return TextEncoder.from_pretrained(self.root, length, torch.float32, self.device)

    def run(self, model: Any) -> "list[Tensor]":
        return [model.encode(PROMPTS)]

    def run_theirs(self, diffusers: Any, transformers: Any) -> "list[Tensor]":
        from ..models.checkpoint import component_folder

        try:
            tokenizer = transformers.T5Tokenizer.from_pretrained(component_folder(self.root, "tokenizer"))
        except (ImportError, ValueError) as error:  # what it takes to read `spiece.model` is not there
            raise MissingPackageError(str(error)) from error
        model = self.load_theirs(transformers.T5EncoderModel)
        pipeline = diffusers.CogVideoXPipeline(tokenizer, model, None, None, None)
        length = self.configs.transformer.max_text_seq_length
        return [pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=length, device=self.device)]


def recorded_hash(root: Path, name: str) -> str | None:
    """The SHA-256 of a file of weights that the hub said when it was downloaded, where that is on the disk."""
    place, record = (root / name).resolve(), root / HUB_RECORDS / f"{name}.metadata"
    said = ""
    if place.parent.name == "blobs":  # of the hub's cache, which names them so
        said = place.name
    elif record.is_file():  # lines: the commit, the hash, the time
        said = "".join(record.read_text(errors="replace").splitlines()[1:2])
    return said if re.fullmatch("[0-9a-f]{64}", said) else None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
