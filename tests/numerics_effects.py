"""What each choice of `Numerics` does to a clip: from "sat", one field changed to diffusers' at a time, same seed."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from cogvx import Pipeline
from cogvx.data.pixels import to_tensor
from cogvx.data.shapes import parse, render
from cogvx.eval.reconstruction import psnr
from cogvx.numerics import DIFFUSERS, SAT, Numerics

HERE = Path(__file__).parent
PROMPT = "a large red circle moves left on a black background"
SMALL_PROMPT = "a red circle moves left"
HEADER = ["| field | sat -> | PSNR, dB | mean difference, levels | measured on |", "|---|---|---|---|---|"]
SMALL = "a random small model like "

# Of each field: the checkpoint, and how it is called, in words and as arguments.
WHERE = {
    "rope_positions": ("tiny", "the embedded checkpoint, 64 x 96 pixels", {"width": 96}),
    "rope_dtype": ("tiny", "the embedded checkpoint in bf16", {"dtype": torch.bfloat16}),
    "latents_between_steps": ("tiny", "the embedded checkpoint in bf16", {"dtype": torch.bfloat16}),
    "sincos_table": ("2b", SMALL + "2B, 48 x 48 pixels", {"width": 48}),
    "text_tokens_1_5": ("1.5-5b", SMALL + "1.5-5B", {}),
    "image_latent_1_5": ("1.5-5b-i2v", SMALL + "1.5-5B-I2V", {"image": np.full((48, 64, 3), 90, np.uint8)}),
    "vae_encode_chunks": ("tiny", "the embedded checkpoint, video to video, strength 0.5", {"strength": 0.5}),
    "vae_decode_chunks": ("tiny", "the embedded VAE, a clip's latents repeated to 41", {"latents": 41}),
    "odd_latents": ("tiny", "the embedded VAE, a clip's latents repeated to 15", {"latents": 15}),
}
USUAL = ("tiny", "the embedded checkpoint", {})


def rows(*names: str) -> Iterator[str]:
    """The table's lines of these fields, or of all."""
    for f in fields(Numerics):
        if not names or f.name in names:
            yield row(f.name)


def row(name: str) -> str:
    other = getattr(DIFFUSERS, name)
    model, words, how = WHERE.get(name, USUAL)
    one, changed = by_sat(name if name in WHERE else ""), made(model, replace(SAT, **{name: other}), how)
    difference = np.abs(one.astype(int) - changed.astype(int)).mean()
    ratio = "equal" if np.array_equal(one, changed) else f"{psnr(one, changed):.1f}"
    return f"| `{name}` | `{other}` | {ratio} | {difference:.3f} | {words} |"


@cache
def by_sat(name: str) -> np.ndarray:
    """What is compared with: the clip under "sat", called as the field of that name asks for, or as usual."""
    model, _, how = WHERE.get(name, USUAL)
    return made(model, SAT, how)


def made(model: str, numerics: Numerics, how: dict) -> np.ndarray:
    how = dict(how)
    with torch.inference_mode():
        pipeline = Pipeline.from_pretrained(folder(model), how.pop("dtype", None), "cpu", numerics)
        if "latents" in how:
            z = pipeline.vae.encode(to_tensor(rendered())).mode() * pipeline.configs.vae.scaling_factor
            return pipeline.decode(z.repeat(1, 1, 9, 1, 1)[:, :, : how["latents"]])[0]
    if "strength" in how:
        how["video"] = rendered()
    common = {"seed": 0, "num_inference_steps": 12, "progress": False}
    if model == "tiny":
        return pipeline(PROMPT, **common | how).frames
    return pipeline(SMALL_PROMPT, **common | {"num_inference_steps": 6, "num_frames": 17} | how).frames


def rendered() -> np.ndarray:
    return render(parse(PROMPT), np.random.default_rng(0))


@cache
def folder(model: str) -> Path | str:
    """A random small pipeline of a kind, as the tests' fixture builds it; 1.5 with the released number of tokens."""
    if model == "tiny":
        return model
    sys.path.insert(0, str(HERE / "host_cuda"))
    spec = importlib.util.spec_from_file_location("small_models", HERE / "conftest.py")
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    root = TemporaryDirectory()
    KEPT.append(root)
    path = Path(root.name)
    small._random_pipeline(model, path / "vocabulary").save_pretrained(path / "model")
    if model.startswith("1.5"):
        config = path / "model" / "transformer" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"max_text_seq_length": 226}))
    return path / "model"


KEPT: list[TemporaryDirectory] = []
