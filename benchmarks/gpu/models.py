"""The stage `models`: a block, a step and the VAE of 2B and 5B beside diffusers', and 50 steps estimated from five.

Weights are random. Results are held against the same model on plain PyTorch, and against diffusers' where it imports.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cost
import torch
from timing import DEVICE, TOY, seconds, shares, synchronize, times
from torch import Tensor

from cogvx.config import PRESETS, TransformerConfig, VAEConfig
from cogvx.diffusion.guidance import guide
from cogvx.diffusion.samplers import ddim
from cogvx.diffusion.schedule import sampling_steps
from cogvx.machine import peak_of_tensors
from cogvx.models import CausalVAE, ExpertTransformer
from cogvx.models.transformer import Stream
from cogvx_kernels import use_backend
from cogvx_kernels.testing import Normal

from .record import Record, from_arguments

DTYPE = torch.float32 if TOY else torch.bfloat16  # not every CPU multiplies in bf16
CLOSE = 5e-2  # of the norm of a result: many layers in bf16
LATENTS = (1, 16, 3, 4, 6) if TOY else (1, 16, 13, 60, 90)
VIDEO = (1, 3, 9, 32, 48) if TOY else (1, 3, 49, 480, 720)
NUM_TEXT, MEASURED, STEPS = (8, 2, 4) if TOY else (226, 5, 50)
LEAST_SECONDS = 6.0


@dataclass
class Work:
    """One thing to time: what it must cost, how we do it, and how diffusers does."""

    label: str
    least: cost.Cost
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor] | None
    compile: Callable[[], object] | None  # diffusers' modules


def main() -> None:
    record = from_arguments()
    record.put(dtype=str(DTYPE), diffusers=why_no_diffusers() or "imports")
    makers = {"2b": partial(transformer, "2b"), "VAE": vae, "5b": partial(transformer, "5b")}
    for compiled in (False, True):  # compilers take longest
        for name, make in makers.items():
            if compiled and TOY and name != "2b":
                continue
            if record.seconds_left() < LEAST_SECONDS or (compiled and why_no_diffusers()):
                record.leave_out(f"{name}, compiled" if compiled else name)
                continue
            with torch.no_grad():
                for work in make(record, compiled):
                    measure(record, work, compiled)
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    record.finish()
    raise SystemExit(1 if any("wrong" in row for row in record.content["rows"]) else 0)


def why_no_diffusers() -> str | None:
    if importlib.util.find_spec("diffusers") is None:
        return "diffusers is not installed"
    try:
        import diffusers  # noqa: F401
    except Exception as error:  # an installation that does not fit
        return f"diffusers does not import: {error}"[:300]
    return None


def measure(record: Record, work: Work, compiled: bool) -> None:
    if compiled:
        contestants = [("diffusers, compiled", work.theirs)]
        work.compile()
    else:
        contestants = [("ours", work.ours), ("eager torch", _plain(work.ours))]
        if work.theirs is None:
            record.add(what=work.label, by="diffusers", absent=why_no_diffusers())
        else:
            contestants.append(("diffusers", work.theirs))
    for label, call in contestants:
        if record.seconds_left() < LEAST_SECONDS:
            record.leave_out(f"{work.label}, {label}")
            continue
        try:
            record.add(what=work.label, by=label, **_measured(work, label, call))
        except Exception as error:  # memory, or a compiler
            key = "wrong" if label == "ours" else "absent"
            record.add(what=work.label, by=label, **{key: f"{type(error).__name__}: {error}"[:300]})
            if "CUDA error" in str(error):  # after which nothing runs in this process
                raise


def _measured(work: Work, label: str, call: Callable[[], Tensor]) -> dict[str, Any]:
    expected = work.ours().float()
    distance = ((call().float() - expected).norm() / expected.norm()).item()
    del expected
    row = {"distance from ours": distance}
    if not distance <= CLOSE:
        row["wrong"] = f"{distance:.3g} from ours, above {CLOSE}"
    found = times(call, 2 if TOY else 10, at_most=3.0)
    row |= {"ms": found.median * 1e3, "iqr, ms": found.iqr * 1e3, "rounds": found.rounds}
    if DEVICE == "cuda" or label == "ours":
        row["peak, MB"] = round(peak_of_tensors(call, torch.device(DEVICE)) / 1e6, 1)
    return row | shares(work.least, found.median, DTYPE)


def _plain(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with use_backend("reference"):
            return call()

    return run


@contextmanager
def drawn_on_device() -> Iterator[None]:
    """Modules made here are in the tested dtype on the device, with random weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    torch.manual_seed(0)
    try:
        with torch.device(DEVICE):
            yield
    finally:
        torch.set_default_dtype(before)


def transformer(kind: str, record: Record, compiled: bool) -> Iterator[Work]:
    """A block, a step with guidance, and for 2B the steps of a video."""
    config = PRESETS[kind].transformer
    if TOY:
        config = replace(config, num_layers=2, num_attention_heads=2, sample_height=8, sample_width=12, sample_frames=9,
                         time_embed_dim=32, text_embed_dim=32, max_text_seq_length=NUM_TEXT)  # fmt: skip
    with drawn_on_device():
        ours = ExpertTransformer(config).eval()
    theirs = _diffusers_transformer(config, ours)
    normal = Normal(DTYPE, DEVICE, seed=1)
    latents = normal(2, *LATENTS[1:])
    text, timestep = normal(2, NUM_TEXT, config.text_embed_dim), torch.full((2,), 500, device=DEVICE)
    rope = ours.positions((LATENTS[2], LATENTS[3] // 2, LATENTS[4] // 2), NUM_TEXT, latents.device)[1]
    yield _block(kind, ours, theirs, rope)
    modulation = ours.tabulate([500]).at(500)
    on_meta = [x.to("meta") for x in (latents, text, timestep)]
    with torch.device("meta"):
        least = cost.of_model(lambda: ExpertTransformer(config).to(DTYPE)(*on_meta))
    yield Work(
        f"{kind}, a step, guidance batch 2", least, lambda: ours(latents, text, timestep, modulation),
        theirs and (lambda: theirs(latents.transpose(1, 2), text, timestep, image_rotary_emb=rope,
                                   return_dict=False)[0].transpose(1, 2)),
        theirs and (lambda: [block.compile(**_how()) for block in theirs.transformer_blocks]),
    )  # fmt: skip
    if kind == "2b" and not compiled and record.seconds_left() > LEAST_SECONDS:
        estimate(record, ours, text, least)


def _how() -> dict[str, Any]:
    return {"backend": "aot_eager"} if TOY else {"dynamic": False}


def _diffusers_transformer(config: TransformerConfig, ours: ExpertTransformer):
    if why_no_diffusers():
        return None
    from diffusers import CogVideoXTransformer3DModel

    with drawn_on_device():
        theirs = CogVideoXTransformer3DModel.from_config(config.to_dict()).to(DEVICE, DTYPE).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return theirs


def _block(kind: str, ours: ExpertTransformer, theirs, rope) -> Work:
    """One block in the middle of the model, of one sample."""
    config, normal = ours.config, Normal(DTYPE, DEVICE, seed=2)
    tokens = NUM_TEXT + LATENTS[2] * (LATENTS[3] // 2) * (LATENTS[4] // 2)
    x, gate, y = normal(1, tokens, config.width), normal(1, 2, config.width), normal(1, tokens, config.width)
    condition = normal(1, config.time_embed_dim)
    block, silu = ours.transformer_blocks[0], torch.nn.functional.silu(condition)
    norms = torch.stack([block.norm1.modulate(silu), block.norm2.modulate(silu)], 1)
    summed = torch.cat([x[:, :NUM_TEXT] + gate[:, :1] * y[:, :NUM_TEXT], Stream(x, gate, y).vision(NUM_TEXT)], 1)

    def run() -> Tensor:
        x_new, gate_new, y_new = block(Stream(x, gate, y), norms, rope, NUM_TEXT)
        return Stream(x_new, gate_new, y_new).vision(NUM_TEXT)

    def run_theirs() -> Tensor:
        vision, text = summed[:, NUM_TEXT:], summed[:, :NUM_TEXT]
        return theirs.transformer_blocks[0](vision, text, condition, image_rotary_emb=rope)[0]

    with torch.device("meta"):
        one = ExpertTransformer(replace(config, num_layers=1)).to(DTYPE).transformer_blocks[0]
    stream, angles = Stream(x.to("meta"), gate.to("meta"), y.to("meta")), rope and tuple(t.to("meta") for t in rope)
    least = cost.of_model(lambda: one(stream, norms.to("meta"), angles, NUM_TEXT))
    return Work(f"{kind}, a block", least, run, theirs and run_theirs,
                theirs and (lambda: theirs.transformer_blocks[0].compile(**_how())))  # fmt: skip


def estimate(record: Record, model: ExpertTransformer, text: Tensor, least: cost.Cost) -> None:
    """The steps of a video from a few of them: guidance and sampler as in the pipeline, modulation from a table."""
    steps = sampling_steps(PRESETS["2b"].schedule, STEPS)
    table = model.tabulate([step.timestep for step in steps])

    def denoise(x: Tensor, timestep: int, index: int) -> Tensor:
        given = torch.full((2,), timestep, device=DEVICE)
        v = model(torch.cat([x, x]).to(DTYPE), text, given, table.at(timestep)).float()
        return guide(*v.chunk(2), 6.0)

    noise = Normal(torch.float32, DEVICE, seed=3)(*LATENTS)
    ddim(denoise, noise, steps[:1])
    synchronize()
    found = seconds(lambda: ddim(denoise, noise, steps[:MEASURED])) / MEASURED * STEPS
    whole = least * STEPS
    record.add(what=f"2b, {STEPS} steps from {MEASURED} measured", by="ours", ms=found * 1e3,
               **shares(whole, found, DTYPE))  # fmt: skip


def vae(record: Record, compiled: bool) -> Iterator[Work]:
    """Both ways over the whole clip."""
    config = PRESETS["2b"].vae
    if TOY:
        config = replace(config, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)
    with drawn_on_device():
        ours = CausalVAE(config).eval()
    theirs = _diffusers_vae(config, ours)
    normal = Normal(DTYPE, DEVICE, seed=4)
    latents, video = normal(*LATENTS), normal(*VIDEO).clamp(-1, 1)
    with torch.device("meta"):
        on_meta = CausalVAE(config).to(DTYPE)
    size = f"{VIDEO[2]} x {VIDEO[3]} x {VIDEO[4]}"
    yield Work(
        f"VAE, decode {size}", cost.of_model(lambda: on_meta.decode(latents.to("meta"))), lambda: ours.decode(latents),
        theirs and (lambda: theirs.decode(latents).sample), theirs and (lambda: theirs.decoder.compile(**_how())),
    )  # fmt: skip
    yield Work(
        f"VAE, encode {size}", cost.of_model(lambda: on_meta.encode(video.to("meta"))),
        lambda: ours.encode(video).mode(), theirs and (lambda: theirs.encode(video).latent_dist.mode()),
        theirs and (lambda: theirs.encoder.compile(**_how())),
    )  # fmt: skip


def _diffusers_vae(config: VAEConfig, ours: CausalVAE):
    if why_no_diffusers():
        return None
    from diffusers import AutoencoderKLCogVideoX

    theirs = AutoencoderKLCogVideoX.from_config(config.to_dict()).to(DEVICE, DTYPE).eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs


if __name__ == "__main__":
    main()
