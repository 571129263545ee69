"""What is predicted on fake tensors against what the same pipeline allocates on a CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cogvx import Pipeline
from cogvx.inputs import Inputs, planned
from cogvx.machine import peak_of_tensors
from cogvx.memory.load import without_values
from cogvx.memory.plan import Plan
from cogvx.memory.predict import Job, predict
from cogvx.models.lora import read_lora
from cogvx.models.tiling import Tiling
from cogvx.settings import Settings

CPU = torch.device("cpu")
VISITING = Plan("visiting", "visiting", "visiting", halos_on_host=True)
STREAMED = replace(VISITING, text_encoder="streamed", transformer="streamed", sequential_guidance=True)
CASES = {
    "2b": ("2b", 17, 64, Plan()),
    "5b": ("5b", 17, 96, Plan()),
    "one frame": ("5b", 1, 96, Plan()),
    "no guidance": ("5b", 9, 96, Plan()),
    "image": ("5b-i2v", 9, 64, Plan()),
    "image, visiting": ("1.5-5b-i2v", 17, 64, VISITING),
    "visiting": ("2b", 17, 64, VISITING),
    "streamed": ("5b", 9, 64, STREAMED),
    "blend": ("5b", 9, 64, replace(STREAMED, tiling=Tiling("blend", 32, 32, 8))),
    "exact": ("2b", 9, 64, replace(VISITING, tiling=Tiling("exact", 32, 40))),
    "int8": ("2b", 9, 64, Plan(weights="int8")),
    "fp8, streamed": ("5b", 9, 64, replace(STREAMED, weights="fp8")),
    "lora": ("5b", 9, 64, Plan()),
    "lora, streamed": ("5b", 9, 64, STREAMED),
    "image, visiting, 21 latents": ("1.5-5b-i2v", 81, 64, VISITING),
    "blend, 21 latents": ("1.5-5b", 81, 64, replace(VISITING, tiling=Tiling("blend", 32, 32, 8))),
    "41 latents": ("5b", 161, 64, Plan()),
    "video, encoded whole": ("5b", 17, 64, Plan()),
}
# Chunks of the official code: 21 latents begin with 12 frames, 41 with 20. Of the others each takes seconds too.
QUICK = ("image, visiting, 21 latents", "41 latents")


def write_lora(file):
    """Of rank 16, on what attention and the MLP end with."""
    shapes = {"attn1.to_out.0": ((16, 64), (64, 16)), "ff.net.2": ((16, 256), (64, 16))}
    save_file({f"transformer.transformer_blocks.{i}.{layer}.lora_{letter}.weight": torch.randn(shape)
               for i in range(2) for layer, pair in shapes.items() for letter, shape in zip("AB", pair, strict=True)},
              file)  # fmt: skip
    return file


def measured(folder, job_settings: Settings, inputs: Inputs, plan: Plan, loras: list) -> int:
    """The most bytes at once, weights included, whichever memory they are in."""
    loaded = Pipeline.from_pretrained(folder, device="cpu", loras=loras)
    parts = loaded.transformer, loaded.vae, loaded.text_encoder, loaded.configs
    pipeline = Pipeline(*parts, numerics=loaded.numerics, plan=plan, device=CPU)
    weights = {id(t): t.nbytes for part in (loaded.transformer, loaded.vae, loaded.text_encoder.model)
               for t in (*part.parameters(), *part.buffers())}  # fmt: skip

    def make() -> None:
        with torch.inference_mode():
            latents = pipeline.make_latents([job_settings], inputs, {}, None, False)
            for _ in pipeline.decode_levels(latents):
                pass

    make()  # libraries and tables that are made once
    return peak_of_tensors(make, CPU) + sum(weights.values())


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in CASES]
)
def test_within_a_tenth_of_what_is_allocated(small_checkpoint, tmp_path, name):
    kind, num_frames, width, plan = CASES[name]
    folder = small_checkpoint(kind)
    pipeline = Pipeline.from_pretrained(folder, device="cpu")
    size = 48, width, 3
    image = np.zeros(size, np.uint8) if pipeline.configs.takes_image else None
    video = np.zeros((num_frames, *size), np.uint8) if name.startswith("video") else None
    settings = Settings("a red circle", num_frames=num_frames, height=48, width=width, num_inference_steps=3, seed=0,
                        guidance_scale=1.0 if name == "no guidance" else 6.0, strength=None if video is None else 1.0,
                        longer="riflex" if num_frames > 17 else None)  # fmt: skip
    settings, inputs = planned(settings, Inputs.read(image, video=video), pipeline.configs, pipeline.numerics)
    job = Job(pipeline.configs, settings, torch.float32, pipeline.text_encoder.model.config, "cpu", pipeline.numerics)
    loras = [(write_lora(tmp_path / "style.safetensors"), 1.0)] if name.startswith("lora") else []
    job = replace(job, loras=tuple(without_values(read_lora(file)) for file, _ in loras))
    found = predict(Pipeline, job, plan)
    predicted = max(stage.device + stage.host for stage in found.stages.values())
    allocated = measured(folder, settings, inputs, plan, loras)
    assert abs(predicted - allocated) <= 0.1 * allocated, f"predicted {predicted}, allocated {allocated}"


@pytest.mark.soak
@pytest.mark.parametrize("model", ["tiny", "tiny-i2v"])
def test_a_block_more_is_what_one_more_was(model):
    """Peaks that are drawn on from a few blocks are those of all blocks."""
    pipeline = Pipeline.from_pretrained(model, device="cpu")  # six blocks
    settings = Settings("x", num_frames=9, num_inference_steps=3, seed=0).resolve(pipeline.configs)
    job = Job(pipeline.configs, settings, torch.bfloat16, pipeline.text_encoder.model.config, "cuda")
    for plan in (Plan(), STREAMED):
        drawn_on, whole = predict(Pipeline, job, plan), predict(Pipeline, job, plan, few=6)
        assert drawn_on == whole
