from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from cogvx.train.finetuning import Finetuning
from cogvx.train.losses import LossWeights
from cogvx.train.options import TrainingError, read_options, to_toml
from cogvx.train.vae_clips import VAERun


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)


@dataclass(frozen=True)
class Outer:
    out: Path
    steps: int = 10
    name: str = "a"
    is_on: bool = False
    kind: Literal["x", "y"] = "x"
    decay: float | None = None
    title: str | None = None
    inner: Inner = field(default_factory=Inner)


def test_words_go_before_the_file_and_the_file_before_the_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('out = "runs/a"\nsteps = 20\nname = "file"\n[inner]\nlr = 1\n')
    run = read_options(Outer, file, ["steps=30", "inner.betas=[0.5, 1]", "is_on=true", "decay=0.5", "name=two words"])
    assert run == Outer(Path("runs/a"), 30, "two words", True, "x", 0.5, inner=Inner(1.0, (0.5, 1.0)))
    assert isinstance(run.inner.lr, float)
    assert read_options(Outer, file, ["decay=none"]).decay is None


@pytest.mark.parametrize("text", ["2024", "2024-05-01", "7", "1e5", "true", "[1]", "07:30:00", "0x10"])
def test_a_word_that_toml_would_read_as_something_else_is_text_where_text_is_wanted(text):
    run = read_options(Outer, None, [f"out={text}", f"name={text}", f"title={text}"])
    assert (run.out, run.name, run.title) == (Path(text), text, text)
    assert read_options(Outer, None, [f"out='{text}'"]).out == Path(text)
    assert read_options(Outer, None, ["out=a", "steps=7", "decay=1", "title=none"]) == Outer(Path("a"), 7, decay=1.0)


def test_the_options_come_back_from_their_toml(tmp_path):
    run = Outer(Path('a "b" é'), 3, "c\\d", True, "y", inner=Inner(1e-5))
    (tmp_path / "run.toml").write_text(to_toml(run))
    assert read_options(Outer, tmp_path / "run.toml") == run
    for run in (
        Finetuning(data=Path("clips"), out=Path("runs"), ema_decay=0.99, num_frames=17),
        VAERun(data=Path("clips"), out=Path("runs"), weights=LossWeights(adversarial_start=None)),
    ):
        (tmp_path / "run.toml").write_text(to_toml(run))
        assert read_options(type(run), tmp_path / "run.toml") == run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stepz=3"], r"stepz is no option; did you mean steps\?"),
        (["inner.lrr=3"], r"inner\.lrr is no option; did you mean inner\.lr\?"),
        (["zzz=3"], "zzz is no option; valid: out, steps"),
        (["steps"], "'steps' changes no option; write key=value"),
        (["steps=1.5"], "steps is 1.5; it must be a whole number"),
        (["steps=true"], "steps is True; it must be a whole number"),
        (["inner.lr=fast"], r"inner\.lr is 'fast'; it must be a number"),
        (["inner.lr=nan"], r"inner\.lr is nan; it must be a number"),
        (["is_on=1"], "is_on is 1; it must be true or false"),
        (["kind=z"], "kind is 'z'; it must be one of x, y"),
        (["inner=3"], r"inner is 3; it is a group of options, such as inner\.lr"),
        (["steps.a=3", "steps.b.c=4", "steps=2", "steps.d=1"], "steps is a value, not a group"),
        (["inner.betas=3"], r"inner\.betas is 3; it must be a list"),
    ],
)
def test_bad_options_are_named(words, message):
    with pytest.raises(TrainingError, match=message):
        read_options(Outer, None, ["out=a", *words])


def test_a_missing_option_and_a_bad_file_are_named(tmp_path):
    with pytest.raises(TrainingError, match="out is missing; give it in the file or as out="):
        read_options(Outer, None)
    with pytest.raises(TrainingError, match="cannot be read: No such file"):
        read_options(Outer, tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(TrainingError, match="is no valid TOML"):
        read_options(Outer, tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("num_steps=0", "num_steps is 0; it must be at least 1"),
        ("num_frames=16", r"num_frames is 16; it must be 8N\+1"),
        ("lora.alpha=0", r"lora\.alpha is 0\.0; it must be above 0"),
        ("drop_text=1.5", "drop_text is 1.5; it must be from 0 to 1"),
        ("start=scratch", "start is scratch; it must be checkpoint for a LoRA"),
        ("lora.targets=[]", r"lora\.targets is \[\]; it must be at least one end of layers' names"),
    ],
)
def test_values_without_meaning_are_named(word, message):
    with pytest.raises(TrainingError, match=message):
        read_options(Finetuning, None, ["data=a", "out=b", word])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimiser.betas=[0.9]", r"optimiser\.betas is \(0\.9,\); it must be two numbers, each from 0 to below 1"),
        ("optimiser.betas=[0.9, 1]", r"optimiser\.betas is \(0\.9, 1\.0\); it must be two numbers, each from 0"),
        ("optimiser.betas=[-0.1, 0.9]", r"optimiser\.betas is \(-0\.1, 0\.9\)"),
        ("optimiser.lr=0", r"optimiser\.lr is 0\.0; it must be above 0"),
        ("optimiser.eps=0", r"optimiser\.eps is 0\.0; it must be above 0"),
        ("optimiser.clip_norm=-1", r"optimiser\.clip_norm is -1\.0; it must be above 0"),
        ("optimiser.weight_decay=-0.1", r"optimiser\.weight_decay is -0\.1; it must be at least 0"),
        ("optimiser.num_warmup=-1", r"optimiser\.num_warmup is -1; it must be at least 0"),
        ("optimiser.least=1.5", r"optimiser\.least is 1\.5; it must be from 0 to 1"),
        ("seed=-1", "seed is -1; it must be from 0 to 4294967295"),
        ("seed=20000000000000", "seed is 20000000000000; it must be from 0 to 4294967295"),
        ("num_frames=-7", r"num_frames is -7; it must be 8N\+1, from 1 on"),
    ],
)
@pytest.mark.parametrize("kind", [Finetuning, VAERun])
def test_every_run_names_what_it_cannot_work_with(kind, word, message):
    with pytest.raises(TrainingError, match=message):
        read_options(kind, None, ["data=a", "out=b", word])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("discriminator_lr=0", r"discriminator_lr is 0\.0; it must be above 0"),
        ("weights.kl=-1", r"weights\.kl is -1\.0; it must be at least 0"),
        ("weights.adversarial_start=-1", r"weights\.adversarial_start is -1; it must be at least 0, or none"),
    ],
)
def test_a_vae_has_a_discriminator_with_a_rate_and_no_loss_turned_round(word, message):
    with pytest.raises(TrainingError, match=message):
        read_options(VAERun, None, ["data=a", "out=b", word])


def test_the_largest_seed_is_one_that_all_generators_take():
    run = read_options(Finetuning, None, ["data=a", "out=b", "seed=4294967295"])
    torch.Generator().manual_seed(run.seed * 1_000_003 + 10**9)
    np.random.default_rng((run.seed, 0))
