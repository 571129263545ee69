"""The loop on made-up latents: resuming, what is not finite, SIGTERM, its log."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tomllib
from pathlib import Path
from threading import Event

import pytest
import torch

from cogvx.config import PRESETS, ScheduleConfig, TransformerConfig
from cogvx.data.clips import Clip
from cogvx.models.checkpoint import TINY, CheckpointError
from cogvx.models.transformer import ExpertTransformer
from cogvx.settings import Configs
from cogvx.train import checkpoint, finetune
from cogvx.train.checkpoint import Saver, load_state
from cogvx.train.finetune import train
from cogvx.train.finetuning import Finetuning, LoRAOptions, Optimiser, tokens_of
from cogvx.train.log import Log
from cogvx.train.options import TrainingError
from cogvx.train.sampling import Draws, Example, rows_of

SMALL = TransformerConfig(
    num_attention_heads=1, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, time_embed_dim=8,
    text_embed_dim=16, max_text_seq_length=8, sample_width=8, sample_height=8, sample_frames=17,
    use_rotary_positional_embeddings=True,
)  # fmt: skip
SEEING = dataclasses.replace(SMALL, in_channels=8)  # an image beside the clip
WIDE = dataclasses.replace(SMALL, attention_head_dim=32)
SIZES = [(1, 4, 4), (3, 4, 6), (2, 6, 4)]  # of latents; three examples, so that steps end in the midst of an epoch


def examples(config: TransformerConfig = SMALL) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    known = [
        Example(torch.randn(4, *size, generator=generator), torch.full((4, *size), 0.1),
                torch.randn(5, 16, generator=generator)) for size in SIZES
    ]  # fmt: skip
    if config is not SEEING:
        return known
    return [each._replace(images=(each.mean[None, :, 0], each.std[None, :, 0])) for each in known]


def draws(seed: int = 0, config: TransformerConfig = SMALL, drop_image: float = 0.0) -> Draws:
    return Draws(config, ScheduleConfig(), 0.7, torch.zeros(5, 16), 0.3, seed, drop_image=drop_image)


def model(config: TransformerConfig = SMALL) -> ExpertTransformer:
    torch.manual_seed(1)
    made = ExpertTransformer(config).init_for_training()
    for parameter in made.parameters():  # an untrained model's gates are zero, and with them every LoRA's gradient
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return made


def options(folder, **changes) -> Finetuning:
    run = Finetuning(
        data=folder, out=folder / "run", num_steps=4, batch=2, save_every=2, precision="fp32", kind="transformer",
        optimiser=Optimiser(lr=1e-2, num_warmup=1), lora=LoRAOptions(rank=2, alpha=4.0), device="cpu",
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def stopped_at(step: int) -> pytest.MonkeyPatch:
    """A patched step, the first being 0, in which SIGTERM comes to this process and its workers, as to a group."""
    original, calls = finetune.accumulate, []

    def accumulate(*given):
        calls.append(1)
        for pid in (*(worker.pid for worker in multiprocessing.active_children()), os.getpid()):
            if len(calls) == step + 1:
                os.kill(pid, signal.SIGTERM)
        return original(*given)

    patch = pytest.MonkeyPatch()
    patch.setattr(finetune, "accumulate", accumulate)
    return patch


def after_sigterm(function):
    """The function, to be called when SIGTERM has just come."""

    def called(*given, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*given, **named)

    return called


def rows(run: Finetuning) -> list[dict]:
    lines = (run.out / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


EIGHT_BITS = Optimiser(lr=1e-2, num_warmup=1, bits=8)  # for weights of 4,096 numbers and more
SET_UPS = [
    {},
    {"kind": "lora"},
    {"accumulation": 3},
    {"kind": "lora", "accumulation": 2, "batch": 1},
    {"ema_decay": 0.9},
    {"kind": "lora", "ema_decay": 0.5, "precision": "bf16"},
    {"precision": "bf16"},
    {"checkpointing": True},
    {"batch": 1},
    {"non_finite": "skip"},
    {"precision": "fp16", "kind": "lora"},
    {"drop_text": 1.0, "save_every": 3},
    {"drop_image": 0.3},
    {"drop_image": 0.3, "kind": "lora"},
    {"workers": 2, "ema_decay": 0.9},
    {"workers": 2, "kind": "lora", "accumulation": 2},
    {"optimiser": EIGHT_BITS, "ema_decay": 0.5},
    {"optimiser": EIGHT_BITS, "kind": "lora", "lora": LoRAOptions(256, 4.0), "workers": 2, "accumulation": 2},
]


@pytest.mark.parametrize("changes", SET_UPS, ids=lambda changes: ", ".join(changes) or "full")
def test_a_run_stopped_by_sigterm_goes_on_bit_by_bit(tmp_path, changes):
    whole, halves = options(tmp_path / "a", **changes | {"workers": 0}), options(tmp_path / "b", **changes)
    config = WIDE if halves.optimiser.bits == 8 and halves.kind == "transformer" else SMALL
    config = SEEING if "drop_image" in changes else config
    known = examples(config), draws(0, config, whole.drop_image)
    wanted, first, second = model(config), model(config), model(config)
    assert train(whole, wanted, *known) == 4
    patch = stopped_at(1)
    assert train(halves, first, *known) == 2
    patch.undo()
    assert not multiprocessing.active_children()
    assert not (halves.out / "transformer").exists() and not (halves.out / finetune.ADAPTER).exists()
    assert train(halves, second, *known) == 4
    for name, value in wanted.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert rows(whole) == rows(halves) and [row["step"] for row in rows(whole)] == [1, 2, 3, 4]
    results = [sorted(p.relative_to(r.out) for p in r.out.rglob("*.safetensors")) for r in (whole, halves)]
    made = finetune.ADAPTER if halves.kind == "lora" else "transformer/diffusion_pytorch_model.safetensors"
    assert results[0] == results[1] and Path(made) in results[0]
    for path in results[0]:
        assert (whole.out / path).read_bytes() == (halves.out / path).read_bytes(), path


def test_sigterm_while_the_last_state_and_the_result_are_written_ends_nothing(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(Saver, "wait", after_sigterm(Saver.wait))
    monkeypatch.setattr(finetune, "write_result", after_sigterm(finetune.write_result))
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))  # else it would end the tests
    try:
        run = options(tmp_path, num_steps=1, kind="lora")
        assert train(run, model(), examples(), draws()) == 1
        assert (run.out / finetune.ADAPTER).exists() and load_state(run.out)[0] == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not ended


@pytest.mark.parametrize("kind", ["transformer", "lora"])
def test_a_state_is_that_of_its_step_however_late_it_is_written(tmp_path, monkeypatch, kind):
    run = options(tmp_path, kind=kind, save_every=1, keep_last=4, ema_decay=0.5)
    write, add, late = checkpoint._write, Log.write, Event()
    monkeypatch.setattr(checkpoint, "_write", lambda *given: late.wait(60) and write(*given))
    # Step 2 has changed all weights when the state of step 1 is written.
    monkeypatch.setattr(Log, "write", lambda log, row: (add(log, row), late.set() if row["step"] == 2 else None))
    train(run, model(), examples(), draws())
    monkeypatch.undo()
    one = options(tmp_path / "one", kind=kind, num_steps=1, ema_decay=0.5)
    train(one, model(), examples(), draws())
    names = ("model", "average", "optimiser")
    files = [(r.out / "step-0000001" / f"{name}.safetensors").read_bytes() for r in (run, one) for name in names]
    assert files[:3] == files[3:]


def test_eight_bits_of_a_moment_are_saved_as_they_are_and_no_other_run_takes_them(tmp_path):
    run = options(tmp_path, optimiser=EIGHT_BITS)
    train(run, model(WIDE), examples(), draws())
    _, trees = load_state(run.out)
    moments = [each["exp_avg"] for each in trees["optimiser_8bit"]["state"].values()]
    codes = [moment["codes"] for moment in moments if isinstance(moment, dict)]
    assert [code.shape.numel() for code in codes] == [4096] * 4 and all(code.dtype == torch.uint8 for code in codes)
    assert all(len(code.unique()) > 50 for code in codes)
    with pytest.raises(CheckpointError, match="has no optimiser; it is that of another kind of run"):
        train(options(tmp_path), model(WIDE), examples(), draws())


def test_what_is_not_installed_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("cogvx.train.finetuning.find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"bits is 8, which needs torchao; pip install 'cogvx\[train\]' has it"):
        options(tmp_path, optimiser=EIGHT_BITS)
    with pytest.raises(TrainingError, match="tensorboard is true, which needs tensorboard"):
        options(tmp_path, tensorboard=True)


def test_something_is_learnt_and_by_what_is_to_learn_alone(tmp_path):
    for kind in ("transformer", "lora"):
        run = options(tmp_path / kind, kind=kind, num_steps=40, batch=3, save_every=100, drop_text=0.0)
        trained = model()
        train(run, trained, examples(), draws())
        losses = [row["loss"] for row in rows(run)]
        assert sum(losses[-10:]) < sum(losses[:10])
        if kind == "lora":
            ups = [value for name, value in trained.state_dict().items() if name.endswith(".up")]
            assert len(ups) == 8 and all(up.any() for up in ups)
        for name, value in model().state_dict().items():
            moved = not torch.equal(value, trained.state_dict()[name])
            assert moved == (kind == "transformer") or "norm_k.bias" in name, name


def test_the_options_and_the_result_are_on_disk(tmp_path):
    run = options(tmp_path, kind="transformer", keep_last=1, ema_decay=0.5)
    trained = model()
    train(run, trained, examples(), draws())
    assert tomllib.loads((run.out / "step-0000004" / "run.toml").read_text())["optimiser"]["lr"] == 1e-2
    assert [path.name for path in run.out.glob("step-*")] == ["step-0000004"]
    saved = ExpertTransformer.from_pretrained(run.out / "transformer")
    weight = "transformer_blocks.0.ff.net.2.weight"
    assert not torch.equal(saved.state_dict()[weight], trained.state_dict()[weight])  # the average, not the last


def test_what_is_not_finite_stops_before_a_weight_changes_or_is_left_out_and_counted(tmp_path):
    bad = examples()
    bad[1] = bad[1]._replace(mean=bad[1].mean * float("nan"))
    order = rows_of(0, 0, 6, 3)
    first_bad = order.index(1)  # with one sample a step
    run, trained = options(tmp_path / "stop", batch=1, num_steps=3, save_every=1), model()
    with pytest.raises(TrainingError, match=f"step {first_bad + 1}: the loss is nan; no weight was changed"):
        train(run, trained, bad, draws())
    assert all(value.isfinite().all() for value in trained.state_dict().values())
    assert len(list(run.out.glob("step-*"))) == min(first_bad, 2)
    run, trained = options(tmp_path / "skip", batch=1, num_steps=6, non_finite="skip"), model()
    assert train(run, trained, bad, draws()) == 6
    assert all(value.isfinite().all() for value in trained.state_dict().values())
    assert rows(run)[-1]["skipped"] == 2


def infinite_at(trained: ExpertTransformer, steps: range) -> ExpertTransformer:
    """The model, whose gradients at some steps, the first being 0, are not finite, while the loss is."""
    calls = []

    def gradient(given: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return given * float("nan") if len(calls) - 1 in steps else given

    trained.proj_out.weight.register_hook(gradient)
    return trained


def test_in_fp16_a_gradient_that_is_not_finite_is_counted_and_stops_a_run_that_has_no_other(tmp_path):
    run = options(tmp_path / "once", precision="fp16", ema_decay=0.5, num_steps=3, save_every=1, keep_last=3)
    train(run, infinite_at(model(), range(1, 2)), examples(), draws())
    averages = [load_state(run.out, step)[1]["average"] for step in (1, 2, 3)]
    moved = [any(not torch.equal(value, after[name]) for name, value in before.items())
             for before, after in itertools.pairwise(averages)]  # fmt: skip
    assert moved == [False, True] and [row["skipped"] for row in rows(run)] == [0, 1, 1]

    run, trained = options(tmp_path / "stop", precision="fp16", num_steps=40, save_every=100), model()
    with pytest.raises(TrainingError, match=r"step 27: the gradient's norm is nan; no weight was changed"):
        train(run, infinite_at(trained, range(40)), examples(), draws())  # 2^16 halved 26 times is 2^-10
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model().state_dict().items())


def test_a_scale_that_fell_as_far_as_it_may_does_not_keep_later_steps_from_learning(tmp_path):
    run, trained = (
        options(tmp_path, precision="fp16", num_steps=30, non_finite="skip", save_every=29, keep_last=2),
        model(),
    )
    train(run, infinite_at(trained, range(29)), examples(), draws())
    assert load_state(run.out, 29)[1]["scaler"]["scale"] == 2.0**-10 and rows(run)[-1]["skipped"] == 29
    assert any(not torch.equal(value, trained.state_dict()[name]) for name, value in model().state_dict().items())


def test_a_state_of_another_model_or_kind_is_refused(tmp_path):
    run = options(tmp_path)
    train(run, model(), examples(), draws())
    torch.manual_seed(0)
    other = ExpertTransformer(dataclasses.replace(SMALL, num_layers=1)).init_for_training()
    with pytest.raises(CheckpointError, match=r"model of step 4 in .* does not fit this run: it holds"):
        train(run, other, examples(), draws())
    with pytest.raises(CheckpointError, match="does not fit this run"):
        train(dataclasses.replace(run, kind="lora"), model(), examples(), draws())
    run = dataclasses.replace(run, out=tmp_path / "lora", kind="lora")  # whose weights fit models of either task
    train(run, model(SEEING), examples(SEEING), draws(0, SEEING))
    with pytest.raises(CheckpointError, match="it is of a model with 8 input channels, this one has 4"):
        train(run, model(), examples(), draws())
    run = dataclasses.replace(run, model=str(shutil.copytree(TINY, tmp_path / "other")))
    assert train(run, model(SEEING), examples(SEEING), draws(0, SEEING)) == 4  # the same checkpoint elsewhere
    (tmp_path / "other" / "transformer" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it is of a LoRA for another checkpoint than this run's model"):
        train(run, model(SEEING), examples(SEEING), draws(0, SEEING))
    run = dataclasses.replace(run, model="tiny")
    with pytest.raises(CheckpointError, match=r"LoRA with alpha 4\.0, this run's lora\.alpha is 2\.0"):
        train(dataclasses.replace(run, lora=LoRAOptions(rank=2, alpha=2.0)), model(SEEING), examples(SEEING), draws())
    with pytest.raises(CheckpointError, match="has no average"):
        train(dataclasses.replace(run, ema_decay=0.9), model(), examples(), draws())


def test_an_epoch_has_every_example_once_and_the_next_another_order():
    order = rows_of(3, 0, 50, 10)
    epochs = [order[i : i + 10] for i in range(0, 50, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert rows_of(3, 17, 20, 10) == order[17:37]


def test_a_step_draws_the_same_again_drops_captions_and_spreads_its_timesteps():
    drawn, again = draws().step(examples(), 5, 300), draws().step(examples(), 5, 300)
    assert all(torch.equal(a.sample.latents, b.sample.latents) for a, b in zip(drawn, again, strict=True))
    assert 60 < sum(not d.sample.text.any() for d in drawn) < 120
    timesteps = sorted(d.sample.timestep for d in drawn)
    assert all(abs(t - 1000 * (i + 0.5) / 300) < 4 for i, t in enumerate(timesteps))
    assert [d.sample.timestep for d in drawn] != timesteps


def test_a_clip_has_as_many_tokens_as_the_text_that_its_numerics_encode(tmp_path):
    preset, clip = PRESETS["1.5-5b"], Clip(tmp_path, "a", "", 9, 64, 96)
    configs = Configs(preset.transformer, preset.vae, preset.schedule)
    for numerics, text in (("sat", 224), ("diffusers", 226), ("sat,text_tokens_1_5=226", 226)):
        # Three latent frames fill two patches in time.
        found = tokens_of(options(tmp_path, numerics=numerics, pack_tokens=text + 2 * 4 * 6), [clip], configs)
        assert found == [text + 2 * 4 * 6]


def test_packed_samples_cost_what_they_cost_one_by_one(tmp_path):
    """The same samples in fewer sequences: longest first, as many as fit."""
    found = []
    for name, changes in (("one", {"batch": 1, "accumulation": 6}), ("packed", {"batch": 6, "pack_tokens": 40})):
        run = options(tmp_path / name, **changes, num_steps=2)
        drawn = draws().step(examples(), 0, 6)
        found.append([len(each) for each in finetune.sequences(run, SMALL, drawn)])
        train(run, model(), examples(), draws())
        found.append([row["loss"] for row in rows(run)])
    # Two of each of 9, 23 and 17 tokens: 23 + 17, 23 + 17, 9 + 9.
    assert found[0] == [1] * 6 and found[2] == [2, 2, 2]
    assert found[3] == pytest.approx(found[1], rel=1e-5)


def test_the_states_before_which_the_loss_was_lowest_are_kept(tmp_path):
    run = options(tmp_path, num_steps=12, keep_last=1, keep_best=2, batch=1)
    train(run, model(), examples(), draws())
    losses = [row["loss"] for row in rows(run)]
    means = {step: (losses[step - 2] + losses[step - 1]) / 2 for step in range(2, 13, 2)}
    best = sorted(means, key=means.get)[:2]
    assert {int(path.name[5:]) for path in run.out.glob("step-*")} == {12, *best}
    score = json.loads((run.out / f"step-{best[0]:07d}" / "manifest.json").read_text())["manifest"]["score"]
    assert score == pytest.approx(means[best[0]])
