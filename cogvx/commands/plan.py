"""cogvx plan: say in how much memory a video can be made, and how; or a model be trained."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ._arguments import DType

if TYPE_CHECKING:
    from ..memory.choose import Choice
    from ..memory.predict import Job


def main(
    what: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[train transformer|lora [CONFIG.toml] [KEY=VALUE ...]]")
    ] = (),
    model: str = "2b",
    memory: str | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
    numerics: str = "sat",
    dtype: DType | None = None,
    weights: Literal["int8", "fp8"] | None = None,
    lora: tuple[Path, ...] = (),
    gpus: int | None = None,
    tflops: float = 300.0,
    link: float = 50.0,
) -> None:
    """Print the fastest plan that makes a video on a GPU within so much memory, and what each stage of it holds.

    With gpus, print instead how several could share the video: what the busiest of them computes and sends, and how
    long that would take by a model of two numbers, tflops and link. Nothing of it is measured.

    Nothing is loaded and no GPU is needed: the models run on tensors without memory. The CUDA context, the workspaces
    of libraries and what an allocator leaves unused come on top, often about 1 GB.

    With "train" in front it prints what a run of cogvx train holds, of the same options, on clips of one size.

    Args:
        what: unset, to make a video; train, transformer or lora, and the options of that run; before flags.
        model: 2b, 5b, 5b-i2v, 1.5-5b, 1.5-5b-i2v, or a checkpoint folder, a hub name, "tiny".
        memory: as in 12GB or 7.5GiB; unset, the fastest plan for every amount.
        num_frames: 8N+1, of CogVideoX 1.5 16N+1; unset, what the model was trained on, as for height and width.
        height: in pixels, a multiple of 16.
        width: in pixels, a multiple of 16.
        num_inference_steps: from 1 to 1000.
        guidance_scale: up to 1 is no guidance.
        numerics: whose arithmetic to follow, and changes to it, as in sat,null_text=encoded.
        dtype: unset, fp16 for 2b and bf16 for all others, as they are published; of a folder, the stored one.
        weights: those of the text encoder's and the transformer's blocks in 8 bits; unset, as stored, and in int8 where
            nothing else keeps the memory.
        lora: files of LoRAs that will be loaded.
        gpus: how many, from 1.
        tflops: what each of them computes, in 10^12 operations a second.
        link: what each of them sends, in GB a second.
    """
    from dataclasses import replace

    from ..memory.choose import GB, amount, choices, choose, read_budget
    from ..memory.load import without_values
    from ..memory.plan import PlanError
    from ..models.lora import read_lora

    check_sharing(memory, gpus, tflops, link)
    budget = None if memory is None else read_budget(memory)
    job = read_job(model, num_frames, height, width, num_inference_steps, guidance_scale, numerics, dtype)
    if what:
        if given := [name for name, value in (("weights", weights), ("lora", lora), ("gpus", gpus)) if value]:
            raise PlanError(f"{', '.join(given)} with {' '.join(what)!r}: training takes none of it; leave it out")
        plan_run(what, model, job, budget)
        return
    job = replace(job, weights=weights, loras=tuple(without_values(read_lora(file)) for file in lora))
    from ..pipeline import Pipeline

    size = f"{job.settings.num_frames} frames of {job.settings.height} x {job.settings.width}"
    print(f"{model} in {str(job.dtype).removeprefix('torch.')}, {size}, {job.settings.num_inference_steps} steps")
    if gpus is not None:
        show_sharing(job, gpus, tflops * 1e12, link * GB)
        return
    if budget is not None:
        show(choose(Pipeline, job, budget))
        return
    least = None
    for choice in choices(Pipeline, job):
        if least is None or choice.prediction.peak < least:
            least = choice.prediction.peak
            print(f"from {amount(least):>9}, {choice.seconds:5.1f} s of moves: {choice.plan}")


def plan_run(words: tuple[str, ...], model: str, job: "Job", budget: int | None) -> None:
    """Print what each stage of a training run holds, with checkpointing where the budget asks for it."""
    from ..memory.choose import amount
    from ..memory.plan import PlanError
    from ..train.finetuning import Finetuning
    from ..train.options import read_options
    from ..train.plan import Size, fitting, plan_training

    if len(words) < 2 or words[0] != "train" or words[1] not in ("transformer", "lora"):
        raise PlanError(f"{' '.join(words)!r} is nothing to plan; valid: train transformer, train lora")
    _, kind, *rest = words
    file = Path(rest.pop(0)) if rest and "=" not in rest[0] else None
    # Neither is looked at: clips of what size, is said by flags.
    run = read_options(Finetuning, file, ["data=-", "out=-", f"model={model}", *rest, f"kind={kind}"])
    if run.model != model:
        raise PlanError(f"model is {run.model!r} and not {model!r}; --model says which one is planned for, as 2b or 5b")
    if run.shard != 1:
        raise PlanError(f"shard is {run.shard}; what processes that share the weights out hold is not planned yet")
    size = Size(job.settings.num_frames, job.settings.height, job.settings.width)
    asked = run, job.configs, job.text, size
    plan = plan_training(*asked) if budget is None else fitting(*asked, budget)
    options = f"{run.batch * run.accumulation} samples a step, {run.precision}"
    options += ", checkpointing" if plan.run.checkpointing else ""
    print(f"{kind} of {model}: {size.num_frames} frames of {size.height} x {size.width}, {options}")
    for name, nbytes in plan.stages.items():
        print(f"  {name:16}{amount(nbytes):>10} on the device")
    weights = f"{amount(plan.weights)} of weights; {plan.learning:,} numbers learn"
    print(f"peak: {amount(plan.peak)} on the device, of which in training {weights}")
    if plan.run.checkpointing and not run.checkpointing:
        print("train with checkpointing=true")


def show(choice: "Choice") -> None:
    from ..memory.choose import GB, LINK, amount

    print(f"plan: {choice.plan}")
    for name, stage in choice.prediction.stages.items():
        print(f"  {name:12}{amount(stage.device):>10} on the device{amount(stage.host):>10} on the host")
    moved = sum(choice.prediction.moved.values())
    print(f"peak: {amount(choice.prediction.peak)} on the device, {amount(choice.prediction.host)} on the host")
    print(f"moves: {amount(moved)} of weights, {choice.seconds:.1f} s at {LINK / GB:.0f} GB/s if none is hidden")
    if choice.plan.tiling is not None:
        print("tiles are blended: the frames differ a little from those of an untiled decoder")
    if choice.plan.weights is not None:
        print(f"weights are rounded to {choice.plan.weights}: the frames differ from those of the stored ones")


def check_sharing(memory: str | None, gpus: int | None, tflops: float, link: float) -> None:
    from ..memory.plan import PlanError

    for name, value in (("gpus", gpus), ("tflops", tflops), ("link", link)):
        if value is not None and not 0 < value < math.inf:
            raise PlanError(f"{name} is {value}; it must be above 0")
    if gpus is not None and memory is not None:
        raise PlanError(f"memory is {memory!r} with gpus; plan for one at a time: each GPU needs what one alone does")


def show_sharing(job: "Job", gpus: int, flops: float, link: float) -> None:
    """Every way in which so many GPUs could share the video, beside one alone; those first that take least."""
    from ..parallel.scaling import Work, slowest
    from ..parallel.ways import Limits, Ways, choose_ways, possible

    limits = Limits.of(job.configs, job.settings, job.numerics)
    work = Work(job.configs, job.settings, job.dtype, job.vae_dtype or job.dtype, job.numerics)
    chosen, alone = choose_ways("auto", gpus, limits), slowest(work, Ways(), flops, link).seconds(flops, link)
    print(f"by a model, nothing measured: {flops / 1e12:g} TFLOP/s, {link / 1e9:g} GB/s, no byte hidden behind work")
    print(" guidance  heads tokens frames     PFLOP   GB sent   seconds  faster")
    shares = {ways: slowest(work, ways, flops, link) for ways in possible(gpus, limits)}
    for ways, share in sorted(shares.items(), key=lambda each: each[1].seconds(flops, link)):
        seconds, sent = share.seconds(flops, link), sum(share.sent.values()) / 1e9
        counts = f"{ways.guidance:9}{ways.heads:7}{ways.tokens:7}{ways.frames:7}"
        computed = (share.sampling + share.decoding) / 1e15
        mark = "  auto" if ways == chosen else ""
        print(f"{counts}{computed:10.2f}{sent:10.2f}{seconds:10.1f}{alone / seconds:8.2f}{mark}")
    sent = ", ".join(f"{what} {count / 1e9:.2f} GB" for what, count in sorted(shares[chosen].sent.items()))
    print(f"auto: its slowest process sends {sent or 'nothing'}; one GPU alone takes {alone:.1f} s")
    print("every GPU holds all weights; how much memory sharing saves is not planned")


def read_job(
    model: str,
    num_frames: int | None,
    height: int | None,
    width: int | None,
    steps: int,
    scale: float,
    numerics: str,
    dtype: str | None,
) -> "Job":
    import torch

    from ..config import PRESETS
    from ..memory.load import Files
    from ..memory.predict import Job
    from ..models.checkpoint import resolve_folder
    from ..models.text import TextEncoder
    from ..numerics import read_numerics
    from ..settings import Configs, Settings, read_configs
    from ._arguments import torch_dtype

    how, more = read_numerics(numerics), {}
    if model in PRESETS and model not in ("tiny", "tiny-i2v"):  # those are in the package
        preset = PRESETS[model]
        configs = Configs(preset.transformer, preset.vae, preset.schedule)
        used = torch_dtype(dtype) or (torch.float16 if model == "2b" else torch.bfloat16)
    else:
        configs, folder = read_configs(model), resolve_folder(model)
        used, vae_dtype = Files(folder, configs).dtypes_on(torch.device("cuda"), torch_dtype(dtype))
        text = TextEncoder.from_pretrained(folder, device="meta").model
        more = {"text": text.config, "text_dtype": text.shared.weight.dtype, "vae_dtype": vae_dtype}
    settings = Settings(
        "any", num_frames=num_frames, height=height, width=width, num_inference_steps=steps, guidance_scale=scale
    )
    return Job(configs, settings.resolve(configs, how), used, numerics=how, **more)
