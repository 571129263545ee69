"""Videos made by one process and by several, of the same random models: `python worlds.py FOLDER` writes how far apart.

Processes are forked, so that everything is imported once and what one process makes is made once. Each writes
`SIZE-RANK.json`: of each way of sharing the relative error of latents and of frames, and bytes sent beside predicted.
One process and two also write `alone.mp4` and `together.mp4` with the embedded checkpoint, as the command line does.
`python worlds.py FOLDER kill` (or raise, or freeze) has process 1 of three end in the middle of a video.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import cogvx.__main__
from cogvx.config import PRESETS, TransformerConfig, VAEConfig
from cogvx.inputs import Inputs
from cogvx.models.transformer import ExpertTransformer
from cogvx.models.vae import CausalVAE
from cogvx.numerics import SAT
from cogvx.parallel.processes import Processes, joined
from cogvx.parallel.scaling import Work, share_of
from cogvx.pipeline import Pipeline
from cogvx.settings import Configs, Settings

VAE = VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4)
# 5 heads and 9 x 4 + 7 = 43 tokens divide by no number of processes here; 9 latents are 4 chunks.
USUAL = TransformerConfig(
    num_attention_heads=5, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, time_embed_dim=16,
    text_embed_dim=12, max_text_seq_length=7, sample_width=4, sample_height=4, sample_frames=33,
    use_rotary_positional_embeddings=True,
)  # fmt: skip
# Of three processes the first has text alone, the last one none.
WORDY = replace(USUAL, max_text_seq_length=20, use_rotary_positional_embeddings=False)
CASES = {
    "usual": (USUAL, Settings("a", num_frames=33)),
    "unguided": (USUAL, Settings("a", num_frames=33, guidance_scale=1.0)),
    "wordy": (WORDY, Settings("a", num_frames=9)),
    "windows": (replace(USUAL, sample_frames=17), Settings("a", num_frames=33, longer="windows")),
    "video": (USUAL, Settings("a", num_frames=33, strength=0.5)),
}
WAYS = {
    2: ("usual:guidance=2,frames=1", "usual:heads=2,frames=2", "usual:tokens=2,frames=1", "windows:tokens=2,rows=2",
        "video:auto"),
    3: ("usual:heads=3,frames=3", "usual:tokens=3,frames=2", "wordy:tokens=3", "unguided:auto", "video:heads=3,rows=3"),
    4: ("usual:heads=2,tokens=2", "usual:guidance=2,tokens=2", "usual:guidance=2,heads=2"),
}  # fmt: skip


@dataclass
class Made:
    latents: Tensor
    frames: Tensor
    careful: Tensor  # the velocity of the same weights in fp16, with care
    wide: Tensor  # frames of latents in fp16, of which a chunk overflows


def pipeline_of(case: str) -> tuple[Pipeline, Settings]:
    config, settings = CASES[case]
    torch.manual_seed(0)
    transformer, vae = ExpertTransformer(config).eval(), CausalVAE(VAE).eval()
    numerics = replace(SAT, vae_encode_chunks="8_frames")
    configs = Configs(config, VAE, PRESETS["2b"].schedule)
    settings = replace(settings, num_inference_steps=2, seed=0).resolve(configs, numerics)
    return Pipeline(transformer, vae, None, configs, numerics=numerics), settings


@torch.inference_mode()
def make(pipeline: Pipeline, settings: Settings) -> Made:
    config, generator = pipeline.configs.transformer, torch.Generator().manual_seed(1)
    text = torch.randn(2, 1, config.max_text_seq_length, config.text_embed_dim, generator=generator)
    given = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
    inputs = Inputs()
    if settings.strength is not None:
        size = settings.num_frames, settings.height, settings.width, 3
        inputs = Inputs(video=torch.randint(256, size, generator=generator, dtype=torch.uint8).numpy())
    latents = pipeline.make_latents([settings], inputs, given, None, False)
    frames = torch.cat(list(pipeline.vae.decode_each(latents)), dim=2)
    sent = getattr(pipeline.processes, "sent", {}).copy()
    transformer = pipeline.transformer.half()
    call = latents.expand(2, -1, -1, -1, -1), text.flatten(0, 1), torch.tensor([500, 500])
    careful = transformer(*call, careful=True)
    wide = decoded_past_fp16(pipeline.vae, latents) if settings.strength is not None else frames
    if sent:
        pipeline.processes.sent = sent
    return Made(latents, frames, careful, wide)


def decoded_past_fp16(vae: CausalVAE, latents: Tensor) -> Tensor:
    """Of two and three processes that share chunks: from one in the first of their rounds on, and in the second."""
    vae.half().decoder.conv_in.conv.weight.mul_(40)
    whole = 2e3 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    decoded = []
    for num_fitting, num_latents in ((1, 3), (3, 7)):  # of four chunks
        z = whole.clone()
        z[:, :, :num_latents] *= 0.1
        parts = list(vae.decode_each(z.half()))
        assert [part.dtype for part in parts] == num_fitting * [torch.float16] + (4 - num_fitting) * [torch.float32]
        decoded += [part.float() for part in parts]
    return torch.cat(decoded, dim=2)


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compare(processes: Processes, case: str, asked: str, alone: Made) -> dict:
    pipeline, settings = pipeline_of(case)
    processes.sent.clear()
    processes.share(pipeline, asked, settings)
    made = make(pipeline, settings)
    work = Work(pipeline.configs, settings, torch.float32, torch.float32, pipeline.numerics)
    predicted = share_of(work, processes.ways, processes.rank).sent
    errors = {name: apart(getattr(made, name), getattr(alone, name)) for name in vars(alone)}
    return {"ways": str(processes.ways), **errors, "sent": dict(+processes.sent), "predicted": dict(predicted)}


def compare_all(rank: int, size: int, folder: Path, alone: dict[str, Made]) -> None:
    with joined("cpu") as processes:
        results = {}
        for one in WAYS[size]:
            case, _, asked = one.partition(":")
            results[one] = compare(processes, case, asked, alone[case])
        (folder / f"{size}-{rank}.json").write_text(json.dumps(results))


def generate(output: Path, *words: str) -> None:
    words = ("--seed", "1", "--num-inference-steps", "2", "--dtype", "float32", "--device", "cpu", *words)
    sys.argv = ["cogvx", "generate", "a red circle moves left", "-o", str(output), *words]
    cogvx.__main__.main()


def end_in_the_middle(rank: int, folder: Path, how: str, pipeline: Pipeline) -> None:
    """Process 1 ends in its third call of the transformer; what all others say goes to `rank.json`."""
    calls = []

    def hook(*_: object) -> None:
        calls.append(time.time())
        if rank == 1 and len(calls) == 3:
            (folder / "ended.json").write_text(json.dumps(time.time()))
            if how == "raise":
                raise RuntimeError("no space left")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[how])

    said = "nothing"
    try:
        with joined("cpu") as processes:
            pipeline.transformer.register_forward_pre_hook(hook)
            settings = Settings("a red circle moves left", num_inference_steps=4, seed=1)
            processes.share(pipeline, "auto", settings.resolve(pipeline.configs))
            pipeline.write(folder / "a.mp4", settings.prompt, 1, False, num_inference_steps=4)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps([time.time(), said]))


def in_processes(size: int, call: Callable[[int], None]) -> list[int]:
    """Fork `size` processes that find each other; their statuses, once all have ended or, of a frozen one, it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    sys.stdout.flush()
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            try:
                call(rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    ends = [os.waitpid(child, os.WUNTRACED)[1] for child in children]
    for child, end in zip(children, ends, strict=True):
        if os.WIFSTOPPED(end):
            os.kill(child, signal.SIGKILL)
    return [1 if os.WIFSTOPPED(end) else os.waitstatus_to_exitcode(end) for end in ends]


def main(folder: Path, how: str | None = None) -> int:
    torch.set_num_threads(1)
    if how is not None:
        pipeline = Pipeline.from_pretrained(device="cpu")
        in_processes(3, lambda rank: end_in_the_middle(rank, folder, how, pipeline))
        return 0
    generate(folder / "alone.mp4")
    if any(in_processes(2, lambda rank: generate(folder / "together.mp4", "--parallel", "heads=2"))):
        return 1
    alone = {case: make(*pipeline_of(case)) for case in CASES}
    return max(abs(s) for n in WAYS for s in in_processes(n, lambda rank, n=n: compare_all(rank, n, folder, alone)))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
