"""What a plan will hold, stage by stage: the real pipeline, run on fake tensors that hold nothing.

No formula stands for a layer: the modules, the samplers and the executor of the plan are those that will run. Of
steps that are like the one before, two are made. Nothing is allocated and no GPU is asked for; a fake run for a GPU
takes place on the CPU with the operators' backends for GPUs.

Not in it is what libraries take for themselves: the CUDA context, cuBLAS's and cuDNN's workspaces, and what an
allocator leaves unused between tensors.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5EncoderModel

from ..diffusion.schedule import Step, sampling_steps
from ..host import host_memory
from ..inputs import Inputs
from ..models.choices import num_text_tokens
from ..models.eight_bits import to_eight_bits
from ..models.embeddings import forget_positions
from ..models.linear import WideLinear
from ..models.loading import hollow
from ..models.lora import adapt
from ..models.lora_names import Pair
from ..models.text import with_wide_layers
from ..models.transformer import ExpertTransformer
from ..models.vae import CausalVAE
from ..numerics import SAT, Numerics
from ..settings import Configs, Settings
from ..start import prepare
from .live import LiveBytes
from .placed import BLOCKED
from .plan import Plan

STEPS = 2
PART = {"encode text": "text_encoder", "start": "vae", "modulate": "transformer", "sample": "transformer",
        "decode": "vae"}  # fmt: skip
CHUNKS = 3  # the first ones that a clip is decoded in, none shorter than those behind, which hold no more


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
    numerics: Numerics = SAT
    vae_dtype: torch.dtype | None = None  # None is `dtype`
    text_dtype: torch.dtype | None = None  # that the text encoder is stored in; None is `dtype`, as released
    weights: str | None = None  # "int8" or "fp8": no plan has them otherwise
    eight_bits: str = "int8"  # what `choose` rounds weights to where nothing else keeps a budget
    loras: tuple[dict[str, Pair], ...] = ()  # that will be loaded; their shapes count


@dataclass(frozen=True)
class Stage:
    """Bytes held at most while one part works, those of weights that wait on the host included."""

    device: int
    host: int

    def __add__(self, other: "Stage") -> "Stage":
        return Stage(self.device + other.device, self.host + other.host)

    def __sub__(self, other: "Stage") -> "Stage":
        return Stage(self.device - other.device, self.host - other.host)

    def __mul__(self, times: int) -> "Stage":
        return Stage(self.device * times, self.host * times)


@dataclass(frozen=True)
class Prediction:
    stages: dict[str, Stage]  # "encode text", "start", "modulate", "sample", "decode"
    weights: dict[str, int]  # bytes of "text_encoder", "transformer", "vae"
    moved: dict[str, int]  # bytes of weights that each of them brings to the device for a whole clip

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


def predict(make: Callable[..., Any], job: Job, plan: Plan, few: int = 2, decodes: bool = True) -> Prediction:
    """The peak of every stage of one clip under a plan, in bytes; `make` is the class `Pipeline`.

    Blocks are alike, and each adds the same to a stage: what, is the difference between a run with `few` of them and
    one with a block more, of the text encoder and of the transformer. A block that does not work adds its weights,
    where they lie. Without `decodes` the last stage is left out.
    """
    counts = job.text.num_layers, job.configs.transformer.num_layers
    shallow = tuple(min(few, count) for count in counts)
    stages, moved = _fake_run(make, job, plan, shallow, decodes)
    more = [count - n for count, n in zip(counts, shallow, strict=True)]
    weights = _weights(job, plan, counts)
    if any(more):
        deeper = tuple(n + (rest > 0) for n, rest in zip(shallow, more, strict=True))
        other, other_moved = _fake_run(make, job, plan, deeper, False)
        lower, upper = _weights(job, plan, shallow), _weights(job, plan, deeper)
        idle = {}
        for name in BLOCKED:
            block = upper[name] - lower[name]
            idle[name] = Stage(block, 0) if getattr(plan, name) == "resident" else Stage(0, block)
        for stage, found in stages.items():
            grown = dict(idle)
            if (part := PART[stage]) in BLOCKED:
                (rest,) = (name for name in BLOCKED if name != part)
                grown[part] = other[stage] - found - idle[rest]
            for name, times in zip(BLOCKED, more, strict=True):
                found += grown[name] * times
            stages[stage] = found
        times = dict(zip(BLOCKED, more, strict=True))
        moved = {name: n + (other_moved.get(name, n) - n) * times.get(name, 0) for name, n in moved.items()}
    return Prediction(stages, weights, moved)


def _weights(job: Job, plan: Plan, num_blocks: tuple[int, int]) -> dict[str, int]:
    """Bytes of each part's weights, with so many blocks."""
    parts = dict(zip((*BLOCKED, "vae"), _hollow(_with_blocks(job, num_blocks), plan.weights), strict=True))
    for name in BLOCKED if plan.weights else ():
        to_eight_bits(parts[name], plan.weights)
    return {name: _nbytes(part, _job_of(name, job)) for name, part in parts.items()}


def _job_of(name: str, job: Job) -> Job:
    """With the dtype of one part."""
    return replace(job, dtype=job.vae_dtype or job.dtype) if name == "vae" else job


def _with_blocks(job: Job, num_blocks: tuple[int, int]) -> Job:
    """The same job for models with so many blocks, of the text encoder and the transformer."""
    text, configs = copy.deepcopy(job.text), job.configs
    text.num_layers = num_blocks[0]
    configs = replace(configs, transformer=replace(configs.transformer, num_layers=num_blocks[1]))
    return replace(job, text=text, configs=configs)


def _fake_run(
    make: Callable[..., Any], job: Job, plan: Plan, num_blocks: tuple[int, int], decodes: bool
) -> tuple[dict[str, Stage], dict[str, int]]:
    """The stages of models with so many blocks, of the text encoder and the transformer; and the bytes moved."""
    forget_positions()
    try:
        return _counted(make, job, plan, num_blocks, decodes)
    finally:
        forget_positions()  # which now are fake


def _counted(
    make: Callable[..., Any], job: Job, plan: Plan, num_blocks: tuple[int, int], decodes: bool
) -> tuple[dict[str, Stage], dict[str, int]]:
    settings, how = replace(job.settings, prompt="x"), job.numerics
    job = replace(_with_blocks(job, num_blocks), settings=settings)
    configs = job.configs
    steps = sampling_steps(configs.schedule, settings.num_inference_steps, how.rounding, how.moves, how.zero_snr)
    stages: dict[str, Stage] = {}
    hollow_parts = _hollow(job, plan.weights)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(job.target) as live, torch.inference_mode():
        pipeline = _fake_pipeline(make, job, plan, *hollow_parts)

        def end(name: str) -> None:
            stages[name] = Stage(live.device.peak, live.host.peak)
            gc.collect()  # what only cycles hold would be freed at any time
            live.start_peak()

        live.start_peak()
        latents = _sampled(pipeline, settings, _pixels(job), steps, end)
        moved = pipeline.placed.moved(settings.num_moves / STEPS)
        if decodes:
            # Of the whole clip, whose length says how it is cut and what its first latent gives.
            with closing(pipeline.decode_levels(latents)) as levels:
                for _ in islice(levels, CHUNKS):
                    pass
            end("decode")
            moved = pipeline.placed.moved(settings.num_moves / STEPS)
    return stages, moved


def _hollow(job: Job, weights: str | None) -> tuple[nn.Module, nn.Module, nn.Module]:
    with torch.device("meta"):
        text = T5EncoderModel(job.text).eval()
        with_wide_layers(text)
    transformer = hollow(ExpertTransformer, job.configs.transformer)
    layers = {name for name, _ in transformer.named_modules()}
    if weights is not None and job.loras:
        to_eight_bits(transformer.to(job.dtype), weights)  # before LoRAs come beside them
    for i, lora in enumerate(job.loras):
        for layer in layers & lora.keys():  # of the blocks that are there
            adapt(transformer, layer).add(f"lora_{i}", lora[layer], 1.0)
    return text, transformer, hollow(CausalVAE, job.configs.vae)


def _fake_pipeline(
    make: Callable[..., Any], job: Job, plan: Plan, text: nn.Module, transformer: nn.Module, vae: nn.Module
) -> Any:
    for name, part in (("text_encoder", text), ("transformer", transformer), ("vae", vae)):
        with nullcontext() if getattr(plan, name) == "resident" else host_memory():
            _fill(part, _job_of(name, job))
    if hasattr(text.encoder, "embed_tokens"):
        text.encoder.embed_tokens = text.shared  # one table under two names
    encoder = Tokenless(text, num_text_tokens(job.configs.transformer, job.numerics))
    return make(transformer, vae, encoder, job.configs, numerics=job.numerics, plan=plan, device=torch.device("cpu"))


def _fill(part: nn.Module, job: Job) -> None:
    """Weights as they are loaded, in the place of those that a hollow model lacks."""
    for module in part.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                new = torch.empty(tensor.shape, dtype=_loaded_dtype(module, tensor, job))
                is_parameter = isinstance(tensor, nn.Parameter)
                table[name] = nn.Parameter(new, requires_grad=False) if is_parameter else new


def _loaded_dtype(module: nn.Module, tensor: Tensor, job: Job) -> torch.dtype:
    """As the loader does: a layer that overflows in fp16 is in fp32 unless it is stored in fp16."""
    if not tensor.is_floating_point():
        return tensor.dtype
    is_wide = isinstance(module, WideLinear) and job.dtype == torch.float16 != (job.text_dtype or job.dtype)
    return torch.float32 if is_wide else job.dtype


def _nbytes(part: nn.Module, job: Job) -> int:
    """Bytes of the weights as loaded, those that two modules share once."""
    found = {
        id(tensor): tensor.numel() * _loaded_dtype(module, tensor, job).itemsize
        for module in part.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    }
    return sum(found.values())


class _Enough(Exception):
    """Thrown once the steps that were to be made are."""


def _sampled(
    pipeline: Any, settings: Settings, inputs: Inputs, steps: list[Step], end: Callable[[str], None]
) -> Tensor:
    """The latents of a clip as `Pipeline.make_latents` makes them, of which the first STEPS steps are."""
    text = pipeline.encode_text([settings], {})
    end("encode text")
    with pipeline.at_work("vae"):
        begin = prepare([settings], inputs, steps, pipeline.vae, pipeline.configs, pipeline.numerics)
    end("start")

    at_work = pipeline.at_work

    # The modulation of all steps is made before the first one. What comes between the two grows with no block, and so
    # is no part of a stage whose peak is drawn on from a few.
    @contextmanager
    def watched(part: str) -> Iterator[None]:
        with at_work(part):
            yield
        if part == "modulation":
            end("modulate")

    pipeline.at_work = watched

    def on_step_end(pipeline: Any, index: int, timestep: int, tensors: dict) -> None:
        if index == STEPS - 1:
            raise _Enough

    with suppress(_Enough):
        pipeline.sample(settings, begin, text, on_step_end, False)
    end("sample")
    return torch.empty_like(begin.noisy)[:, :, settings.surplus_latents(pipeline.configs) :]


def _pixels(job: Job) -> Inputs:
    size = job.settings.height, job.settings.width, 3
    image = np.zeros(size, np.uint8) if job.configs.takes_image else None
    starts_from_one = job.settings.strength is not None
    return Inputs(image, video=np.zeros((job.settings.num_frames, *size), np.uint8) if starts_from_one else None)
