"""Teach the embedded checkpoint a colour that it has never seen, from 64 clips.

    python examples/new_colour.py --out runs/plum

Renders 36 clips of plum figures and 28 of the colours that the checkpoint knows, trains a LoRA on them as
`cogvx train lora` does, and lets the judge of Shapes World say how many prompts are obeyed before and after: of plum
figures in combinations of shape, motion and background that are in no clip, and of the known colours. "plum" is no
word of the checkpoint's tokenizer, which spells it. Training that was stopped goes on with the same command.
Training takes about 19 minutes of one thread of a CPU; on top four times 96 clips are made and judged.
"""

from pathlib import Path

import numpy as np
import torch

from cogvx import Pipeline
from cogvx.commands.train import main as train
from cogvx.data.shapes import BACKGROUNDS, COLOURS, FPS, MOTIONS, NEW_COLOURS, SHAPES, SIZES, Scene, render
from cogvx.data.video import write_video
from cogvx.eval.generation import WORDS, Share, evaluation_scenes, judge_scenes, share
from cogvx.models.lora import load_lora
from cogvx.settings import SettingsError

NUM_NEW, NUM_KNOWN = 36, 28
WEIGHT = 0.85  # of the LoRA where it is judged: with a little less than all of it the known scenes suffer less
TRAINING = (
    "device=cpu", "precision=fp32", "num_steps=1500", "batch=8", "save_every=100",
    "optimiser.lr=2e-3", "optimiser.num_warmup=30", "lora.rank=32", "lora.alpha=32",
    'lora.targets=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]',
)  # fmt: skip


def plum_scenes(seed: int = 0) -> tuple[list[Scene], list[Scene]]:
    """The plum scenes to learn from and those to be judged, no combination in both, in an order drawn by `seed`.

    Every shape in every motion is to be learnt before one of three backgrounds, and judged before the other two. The
    first 18 to be learnt are one of each, the next 18 the same in other sizes.
    """
    rng, names = np.random.default_rng(seed), list(BACKGROUNDS)
    kinds = [(shape, motion) for shape in SHAPES for motion in MOTIONS]
    learnt, judged = [], []
    for turn in range(len(SIZES)):
        for i in rng.permutation(len(kinds)):
            first = (i // len(MOTIONS) + i) % len(names)  # the motions of a shape go round the backgrounds
            scenes = [Scene("plum", *kinds[i], name, SIZES[(i + turn) % len(SIZES)]) for name in names]
            learnt.append(scenes.pop(first))
            judged += scenes
    return learnt, [judged[i] for i in rng.permutation(len(judged))]


def scenes_to_learn() -> list[Scene]:
    """Plum scenes, and others of the known colours, so that these are not forgotten."""
    known = evaluation_scenes(2 * NUM_KNOWN, seed=1)[1::2]  # the others are of combinations held out of training
    return plum_scenes()[0][:NUM_NEW] + known


def write_clips(folder: Path, scenes: list[Scene], seed: int = 0) -> None:
    """A clip of every scene, and its prompt as its caption; those that an earlier run had more of go."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("[0-9][0-9].*"):
        file.unlink()
    for i, scene in enumerate(scenes):
        write_video(folder / f"{i:02d}.mp4", render(scene, np.random.default_rng((seed, i))), FPS)
        (folder / f"{i:02d}.txt").write_text(scene.prompt)


def shares(pipeline: Pipeline, scenes: list[Scene], steps: int, guidance_scale: float) -> dict[str, Share]:
    """Of the scenes' prompts, those whose clips are right in a word, and in all of them."""
    how = {"steps": steps, "guidance_scale": guidance_scale}
    records = judge_scenes(pipeline, scenes, **how, palette=COLOURS | NEW_COLOURS)
    return {word: share(records, word) for word in WORDS}


def main(
    out: Path = Path("runs/plum"),
    options: tuple[str, ...] = (),
    model: str = "tiny",
    num_prompts: int = 96,
    num_inference_steps: int = 50,
    guidance_scale: float = 6.0,
) -> dict[str, dict[str, Share]]:
    """Train, and print the shares before and after.

    Args:
        out: the folder of clips, states and adapter.
        options: changes to the training's options, such as num_steps=100; data, out, model and task are not of them.
        model: the checkpoint to teach, one that takes text alone.
        num_prompts: how many are judged of plum figures (108 at most), and how many of the known colours.
        num_inference_steps: of the sampler.
        guidance_scale: how closely the prompts are followed, before and after.
    """
    groups = {"plum": plum_scenes()[1], "known": evaluation_scenes(num_prompts)}
    if num_prompts > len(groups["plum"]):
        raise SettingsError(f"num_prompts is {num_prompts}; there are {len(groups['plum'])} of plum figures")
    groups["plum"] = groups["plum"][:num_prompts]
    adapter, found = out / "run" / "pytorch_lora_weights.safetensors", {}
    write_clips(out / "clips", scenes_to_learn())
    words = f"data={out / 'clips'}", f"out={out / 'run'}", f"model={model}", "task=text_to_video"
    before = adapter.stat().st_mtime_ns if adapter.exists() else None  # that of an earlier run
    train("lora", (*TRAINING, *options, *words))
    if not adapter.exists() or adapter.stat().st_mtime_ns == before:  # stopped by SIGTERM, which `train` has said
        return found
    for when in ("before", "after"):
        pipeline = Pipeline.from_pretrained(model, dtype=torch.float32, device="cpu")
        if when == "after":
            load_lora(pipeline.transformer, adapter, WEIGHT)
        for name, scenes in groups.items():
            found[f"{name}, {when}"] = shares(pipeline, scenes, num_inference_steps, guidance_scale)
    print(table(found))
    return found


def table(found: dict[str, dict[str, Share]]) -> str:
    """The shares in Markdown."""
    rows = [("", *WORDS), ("---",) * (len(WORDS) + 1)]
    rows += [(name, *(f"{s.right} of {s.judged}" for s in words.values())) for name, words in found.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
