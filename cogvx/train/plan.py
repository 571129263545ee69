"""In how much memory a run trains: its own steps on tensors without memory, whose bytes are counted.

No formula stands for anything: the model, its checkpointing, the loss, autograd's own backward and the optimiser are
those of the run. Latents and embeddings are computed before the transformer is on the device, so that the run needs
the most that any of its stages does.

Not in it is what libraries take for themselves: the CUDA context, cuBLAS's and cuDNN's workspaces, and what an
allocator leaves unused between tensors.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5EncoderModel

from ..memory.choose import amount
from ..memory.live import LiveBytes
from ..memory.plan import PlanError
from ..models.choices import num_text_tokens
from ..models.embeddings import forget_positions
from ..models.loading import hollow
from ..models.packed import Sample
from ..models.transformer import ExpertTransformer
from ..models.vae import CausalVAE
from ..numerics import read_numerics
from ..settings import Configs
from .average import Average
from .finetune import accumulate, learning
from .finetuning import Finetuning, latent_size, weight_dtype
from .optim import adamw, clip_gradients
from .sampling import Drawn

Model = TypeVar("Model", bound=nn.Module)


class Size(NamedTuple):
    """Of every clip, in frames and pixels."""

    num_frames: int
    height: int
    width: int


@dataclass(frozen=True)
class TrainingPlan:
    """A run, and what each of its stages holds on the device at most, in bytes."""

    run: Finetuning
    stages: dict[str, int]  # "encode clips", "encode captions", "gradient", "optimiser"
    weights: int  # of the transformer, what learns included
    learning: int  # numbers that learn

    @property
    def peak(self) -> int:
        return max(self.stages.values())


def plan_training(run: Finetuning, configs: Configs, text: T5Config, size: Size, target: str = "cuda") -> TrainingPlan:
    """What the stages of a run hold, for clips of one size; target: the type of the device."""
    before = {
        "encode clips": _clips(run, configs, size, target),
        "encode captions": _captions(text, num_text_tokens(configs.transformer, read_numerics(run.numerics)), target),
    }
    steps = plan_steps(run, configs, size, target)
    return replace(steps, stages=before | steps.stages)


def plan_steps(run: Finetuning, configs: Configs, size: Size, target: str = "cuda") -> TrainingPlan:
    """The same of training alone, where latents and embeddings are on disk already."""
    stages: dict[str, int] = {}
    with _counted(target) as live:
        model = filled(hollow(ExpertTransformer, configs.transformer), weight_dtype(run))
        parameters = learning(run, model.train())
        weights = live.device.now
        optimiser = adamw(parameters.values(), run.optimiser)
        average = Average(parameters, run.ema_decay) if run.ema_decay is not None else None
        for parameter in parameters.values():
            parameter.grad = torch.empty_like(parameter)
        optimiser.step()  # which makes its states, so that the next step is one of those in the midst of a run
        optimiser.zero_grad()
        _end(live)
        accumulate(run, model, _drawn(run, configs, size), torch.amp.GradScaler("cpu", enabled=False))
        stages["gradient"] = _end(live)
        clip_gradients(parameters.values(), run.optimiser.clip_norm)
        optimiser.step()
        if average is not None:
            average.update()
        stages["optimiser"] = _end(live)
    return TrainingPlan(run, stages, weights, sum(p.numel() for p in parameters.values()))


def fitting(run: Finetuning, configs: Configs, text: T5Config, size: Size, budget: int) -> TrainingPlan:
    """The run as it is where it keeps a budget, in bytes, else with checkpointing. Raises PlanError where neither does.

    Nothing is changed that changes a result by more than rounding.
    """
    found: list[TrainingPlan] = []
    for changed in dict.fromkeys((run, replace(run, checkpointing=True))):
        found.append(plan_training(changed, configs, text, size))
        if found[-1].peak <= budget:
            return found[-1]
    least = min(plan.peak for plan in found)
    advice = "a LoRA, precision=bf16, a smaller batch or smaller clips need less"
    raise PlanError(f"memory is {amount(budget)}; this run needs {amount(least)} even with checkpointing: {advice}")


def filled(part: Model, dtype: torch.dtype) -> Model:
    """A hollow model with weights, of no value, that learn nothing yet."""
    for module in part.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                new = torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
                table[name] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
    return part


@contextmanager
def _counted(target: str) -> Iterator[LiveBytes]:
    forget_positions()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(target) as live:
            yield live
    finally:
        forget_positions()  # which now are fake


def _end(live: LiveBytes) -> int:
    """The peak of a stage, which ends here."""
    peak = live.device.peak
    gc.collect()  # what only cycles hold would be freed at any time
    live.start_peak()
    return peak


@torch.no_grad()
def _clips(run: Finetuning, configs: Configs, size: Size, target: str) -> int:
    chunks = [size.num_frames] if run.vae_encode_chunks == "whole" else None
    with _counted(target) as live:
        vae = filled(hollow(CausalVAE, configs.vae), torch.float32)
        posterior = vae.encode(torch.empty(1, 3, *size), chunks)
        del posterior
        return _end(live)


@torch.no_grad()
def _captions(config: T5Config, num_tokens: int, target: str) -> int:
    with torch.device("meta"):
        model = T5EncoderModel(config).eval()
    with _counted(target) as live:
        filled(model, torch.float32)
        if hasattr(model.encoder, "embed_tokens"):
            model.encoder.embed_tokens = model.shared  # one table under two names
        model(torch.zeros(1, num_tokens, dtype=torch.long))
        return _end(live)


def _drawn(run: Finetuning, configs: Configs, size: Size) -> list[Drawn]:
    config, grid = configs.transformer, latent_size(configs, *size)
    text = torch.empty(num_text_tokens(config, read_numerics(run.numerics)), config.text_embed_dim)

    def one() -> Drawn:
        clip = torch.empty(config.out_channels, *grid)
        alpha = torch.empty((), dtype=torch.float64)
        noisy = torch.empty(config.in_channels, *grid)  # and behind it, for image to video, the image
        return Drawn(Sample(noisy, text, 500), clip, torch.empty_like(clip), alpha)

    return [one() for _ in range(run.batch * run.accumulation)]
