"""What a run is predicted to hold against what the same step allocates on a CPU, and against the promised budgets."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cogvx.config import PRESETS, TransformerConfig
from cogvx.machine import peak_of_tensors
from cogvx.memory.predict import t5_xxl
from cogvx.models.transformer import ExpertTransformer
from cogvx.settings import Configs
from cogvx.train import plan as planning
from cogvx.train.average import Average
from cogvx.train.finetune import accumulate, learning
from cogvx.train.finetuning import Finetuning, LoRAOptions, Optimiser
from cogvx.train.lora import ATTENTION
from cogvx.train.optim import adamw
from cogvx.train.plan import Size, fitting, plan_steps

GB = 10**9
SMALL = TransformerConfig(
    num_attention_heads=2, attention_head_dim=64, num_layers=3, time_embed_dim=32, text_embed_dim=32,
    max_text_seq_length=16, sample_width=16, sample_height=16, sample_frames=17, use_rotary_positional_embeddings=True,
)  # fmt: skip
CONFIGS = Configs(SMALL, PRESETS["tiny"].vae, PRESETS["5b"].schedule)
SIZE = Size(17, 128, 128)
CASES = {
    "full": {"kind": "transformer"},
    "full, checkpointing": {"kind": "transformer", "checkpointing": True, "ema_decay": 0.9},
    # Of every layer: on a CPU ours keeps its input though its weights stand still, on a GPU PyTorch's own does not.
    "lora": {"kind": "lora", "accumulation": 2, "lora": LoRAOptions(8, 8.0, (*ATTENTION, "ff.net.0.proj", "ff.net.2"))},
    "lora, checkpointing": {"kind": "lora", "checkpointing": True},
    "full, 8 bits": {"kind": "transformer", "checkpointing": True, "optimiser": Optimiser(bits=8)},
}
QUICK = ("full, checkpointing", "lora, checkpointing")


def run_of(**changes) -> Finetuning:
    given = {"precision": "fp32", "device": "cpu", "lora": LoRAOptions(rank=8, alpha=8.0)}
    return Finetuning(data=Path("-"), out=Path("-"), **(given | changes))


def allocated(run: Finetuning) -> int:
    """The most bytes at once of a step, the second one, weights and states included."""
    torch.manual_seed(0)
    model = ExpertTransformer(SMALL).init_for_training()
    parameters = learning(run, model.train())
    optimiser = adamw(parameters.values(), run.optimiser)
    average = Average(parameters, run.ema_decay) if run.ema_decay is not None else None
    drawn = [each._replace(sample=each.sample._replace(latents=torch.randn_like(each.clip)))
             for each in planning._drawn(run, CONFIGS, SIZE)]  # fmt: skip

    def step() -> None:
        accumulate(run, model, drawn, torch.amp.GradScaler("cpu", enabled=False))
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimiser.step()
        if average is not None:
            average.update()
        optimiser.zero_grad()

    step()
    states = [x for state in optimiser.state.values() for value in state.values() for x in made_of(value)]
    states += list(average.values.values()) if average is not None else []
    given = [x for each in drawn for x in (each.clip, each.noise, *each.sample[:2])]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in (*model.parameters(), *states, *given)}  # fmt: skip
    return peak_of_tensors(step, torch.device("cpu")) + sum(held.values())


def made_of(value: Tensor) -> list[Tensor]:
    """The tensors that hold a state's numbers; a quantised one has none itself."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    return [getattr(value, name) for name in value.__tensor_flatten__()[0]]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in CASES]
)
def test_within_a_tenth_of_what_is_allocated(name):
    run = run_of(**CASES[name])
    predicted, found = plan_steps(run, CONFIGS, SIZE, "cpu").peak, allocated(run)
    assert abs(predicted - found) <= 0.1 * found, f"predicted {predicted:,}, allocated {found:,}"


def test_clips_that_are_encoded_whole_hold_more():
    eights, whole = (planning._clips(run_of(vae_encode_chunks=chunks), CONFIGS, SIZE, "cuda")
                     for chunks in ("8_frames", "whole"))  # fmt: skip
    assert 1.3 * eights < whole < 3 * eights  # of 17 frames, the first chunk being nine


def test_a_step_of_moments_in_eight_bits_holds_what_is_counted():
    def begun() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        weight = nn.Parameter(torch.ones(256, 512))
        weight.grad = torch.ones_like(weight)
        optimiser = adamw([weight], Optimiser(bits=8))
        optimiser.step()
        return weight, optimiser

    _, optimiser = begun()
    found = peak_of_tensors(optimiser.step, torch.device("cpu"))
    with planning._counted("cpu") as live:
        weight, optimiser = begun()
        planning._end(live)
        held = live.device.now
        optimiser.step()
        predicted = live.device.peak - held
    assert abs(predicted - found) <= 0.1 * found
    # Weight and gradient, then for each moment a byte a number, a scale every 256 of them, and 256 values of a byte.
    assert 0 <= held - 2 * weight.nbytes - 2 * (weight.numel() * (1 + 4 / 256) + 1024) < 100


@pytest.mark.soak
@pytest.mark.parametrize(
    ("model", "kind", "budget"), [("2b", "lora", 24), ("5b", "lora", 24), ("2b", "transformer", 40)]
)
def test_the_promised_budgets_are_kept(model, kind, budget):
    preset, run = PRESETS[model], run_of(kind=kind, precision="bf16", lora=LoRAOptions())
    configs = Configs(preset.transformer, preset.vae, preset.schedule)
    assert fitting(run, configs, t5_xxl(), Size(49, 480, 720), budget * GB).peak <= budget * GB
