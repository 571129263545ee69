"""What a plan will hold, stage by stage: the real pipeline, run on fake tensors that hold nothing.

No formula stands for a layer: the modules, the samplers and the executor of the plan are those that will run. Two
steps are made, since each is like the one before. Nothing is allocated and no GPU is asked for; a fake run for a GPU
takes place on the CPU with the operators' backends for GPUs.

Not in it is what libraries take for themselves: the CUDA context, cuBLAS's and cuDNN's workspaces, and what an
allocator leaves unused between tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5EncoderModel

from ..diffusion.schedule import Step, sampling_steps
from ..host import host_memory
from ..inputs import Inputs
from ..models.choices import decode_chunks, num_text_tokens
from ..models.loading import hollow
from ..models.transformer import ExpertTransformer
from ..models.vae import CausalVAE
from ..models.vae import decode_chunks as pairs
from ..numerics import DIFFUSERS, Numerics
from ..settings import Configs, Settings
from ..start import prepare
from .live import LiveBytes
from .plan import Plan

STEPS = 2
WIDE = ".wo.weight"
CHUNKS = 3  # of those that a clip is decoded in, a first, a middle and a last one; middle ones are alike


def t5_xxl() -> T5Config:
    """The text encoder of every released model."""
    return T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )


@dataclass(frozen=True)
class Job:
    """What is to be made, with which models, where."""

    configs: Configs
    settings: Settings  # resolved
    dtype: torch.dtype
    text: T5Config = field(default_factory=t5_xxl)
    target: str = "cuda"  # the type of the device
    numerics: Numerics = DIFFUSERS


@dataclass(frozen=True)
class Stage:
    """Bytes held at most while one part works, those of weights that wait on the device included."""

    device: int
    host: int


@dataclass(frozen=True)
class Prediction:
    stages: dict[str, Stage]  # "encode text", "start", "sample", "decode"
    moved: int  # bytes of weights brought to the device in a whole clip

    @property
    def peak(self) -> int:
        return max(stage.device for stage in self.stages.values())

    @property
    def host(self) -> int:
        return max(stage.host for stage in self.stages.values())


class Tokenless:
    """A text encoder whose every prompt is the same tokens."""

    def __init__(self, model: nn.Module, max_length: int):
        self.model, self.max_length = model, max_length

    def encode(self, prompts: list[str]) -> Tensor:
        return self.model(torch.zeros(len(prompts), self.max_length, dtype=torch.long))[0]


def predict(make: Callable[..., Any], job: Job, plan: Plan) -> Prediction:
    """The peak of every stage of one clip under a plan, in bytes; `make` is the class `Pipeline`."""
    num_moves = job.settings.num_moves
    settings = replace(job.settings, num_inference_steps=STEPS, prompt="x")
    settings = replace(settings, guidance_scale=6.0 if settings.is_guided else 1.0, dynamic_guidance="constant")
    job = replace(job, settings=settings)
    stages: dict[str, Stage] = {}
    hollow_parts, how = _hollow(job), job.numerics
    steps = sampling_steps(job.configs.schedule, STEPS, how.rounding, how.moves, how.zero_snr)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(job.target) as live, torch.inference_mode():
        pipeline = _fake_pipeline(make, job, plan, *hollow_parts)

        @contextmanager
        def stage(name: str) -> Iterator[None]:
            live.start_peak()
            yield
            stages[name] = Stage(live.device.peak, live.host.peak)

        _run(pipeline, settings, _pixels(job), steps, stage)
        moved = pipeline.placed.moved(num_moves / STEPS)
    return Prediction(stages, moved)


def _hollow(job: Job) -> tuple[nn.Module, nn.Module, nn.Module]:
    with torch.device("meta"):
        text = T5EncoderModel(job.text).eval()
    return text, hollow(ExpertTransformer, job.configs.transformer), hollow(CausalVAE, job.configs.vae)


def _fake_pipeline(
    make: Callable[..., Any], job: Job, plan: Plan, text: nn.Module, transformer: nn.Module, vae: nn.Module
) -> Any:
    for part, place in ((text, plan.text_encoder), (transformer, plan.transformer), (vae, plan.vae)):
        with nullcontext() if place == "resident" else host_memory():
            _fill(part, job.dtype)
    if hasattr(text.encoder, "embed_tokens"):
        text.encoder.embed_tokens = text.shared  # one table under two names
    encoder = Tokenless(text, num_text_tokens(job.configs.transformer, job.numerics))
    return make(transformer, vae, encoder, job.configs, numerics=job.numerics, plan=plan, device=torch.device("cpu"))


def _fill(part: nn.Module, dtype: torch.dtype) -> None:
    """Weights as they are loaded, in the place of those that a hollow model lacks."""
    for prefix, module in part.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                # As the loader does: this layer of T5 overflows in fp16.
                kept = (
                    torch.float32 if isinstance(part, T5EncoderModel) and f"{prefix}.{name}".endswith(WIDE) else dtype
                )
                new = torch.empty(tensor.shape, dtype=kept if tensor.is_floating_point() else tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                table[name] = nn.Parameter(new, requires_grad=False) if is_parameter else new


def _run(pipeline: Any, settings: Settings, inputs: Inputs, steps: list[Step], stage: Any) -> None:
    """One clip, as `Pipeline.generate` makes it."""
    with stage("encode text"):
        text = pipeline.encode_text([settings], {})
    with stage("start"), pipeline.at_work("vae"):
        begin = prepare([settings], inputs, None, steps, pipeline.vae, pipeline.configs, pipeline.numerics)
    with stage("sample"):
        latents = pipeline.sample(settings, begin, text, None, False)
    del begin, text
    with stage("decode"):
        latents = latents[:, :, settings.surplus_latents(pipeline.configs) :]
        chunks = decode_chunks(latents.shape[2], pipeline.numerics) or pairs(latents.shape[2])
        for _ in pipeline.decode_levels(latents[:, :, : sum(chunks[:CHUNKS])]):
            pass


def _pixels(job: Job) -> Inputs:
    if not job.configs.takes_image:
        return Inputs()
    return Inputs(image=np.zeros((job.settings.height, job.settings.width, 3), np.uint8))
