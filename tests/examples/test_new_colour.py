"""The example that teaches a new colour: which scenes it takes, and all its steps at toy counts."""

import json
import shutil
from collections import Counter

import new_colour
import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

from cogvx import Pipeline
from cogvx.data.shapes import COLOURS, SIZES, is_held_out
from cogvx.models.lora import load_lora
from cogvx.settings import SettingsError
from cogvx.train.options import TrainingError


def test_no_combination_is_both_learnt_and_judged():
    learnt, judged = new_colour.plum_scenes()
    combinations = [{(s.shape, s.motion, s.background) for s in scenes} for scenes in (learnt, judged)]
    assert (len(learnt), len(judged), len({*learnt, *judged})) == (54, 108, 162)
    assert [len(each) for each in combinations] == [18, 36] and not combinations[0] & combinations[1]
    assert len({(shape, motion) for shape, motion, _ in combinations[0]}) == 18
    for scenes in (learnt, judged):
        assert set(Counter(s.background for s in scenes).values()) == {len(scenes) // 3}
        assert set(Counter(s.size for s in scenes).values()) == {len(scenes) // len(SIZES)}
    plum, known = new_colour.scenes_to_learn()[:36], new_colour.scenes_to_learn()[36:]
    assert plum == learnt[:36] and set(Counter((s.shape, s.motion) for s in plum).values()) == {2}
    assert {s.colour for s in plum} == {"plum"} and len(known) == 28
    assert {s.colour for s in known} == set(COLOURS) and not any(map(is_held_out, known))


@pytest.fixture
def checkpoint(small_checkpoint, tmp_path):
    """A random small one whose own size is that of Shapes World."""
    folder = shutil.copytree(small_checkpoint("2b"), tmp_path / "model")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_height": 8}))
    return folder


def test_it_trains_judges_and_goes_on(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(new_colour, "scenes_to_learn", lambda: new_colour.plum_scenes()[0][:3])
    how = {"model": str(checkpoint), "num_prompts": 2, "num_inference_steps": 2}
    out, options = tmp_path / "out", ("num_steps=2", "batch=2", "optimiser.num_warmup=1", "optimiser.lr=0.05")
    options += f"out={tmp_path / 'elsewhere'}", "model=tiny-i2v", "task=image_to_video"  # which it does not look for
    for name in ("03.mp4", "03.txt"):  # of an earlier run with more clips
        (out / "clips").mkdir(parents=True, exist_ok=True)
        (out / "clips" / name).write_text("no video")
    found = new_colour.main(out, options, **how)
    assert list(found) == ["plum, before", "known, before", "plum, after", "known, after"]
    assert all(words["colour"].judged == 2 for words in found.values())
    assert "| plum, after | 0 of 2 |" in capsys.readouterr().out  # the weights are random ones
    assert not (tmp_path / "elsewhere").exists() and len(list((out / "clips").iterdir())) == 2 * 3
    assert new_colour.main(out, options, **how) == found
    adapter = out / "run" / "pytorch_lora_weights.safetensors"
    before = adapter.read_bytes()
    with pytest.raises(TrainingError, match="num_stepz is no option"):
        new_colour.main(out, (*options, "num_stepz=3"), **how)
    monkeypatch.setattr(new_colour, "train", lambda *given: None)  # stopped by SIGTERM before it wrote an adapter
    assert new_colour.main(out, (*options, "num_steps=3"), **how) == {} and adapter.read_bytes() == before
    compare_with_diffusers(checkpoint, out / "run")


def compare_with_diffusers(checkpoint, adapter):
    """The adapter's frames are diffusers' within a level of 255, and not those of the checkpoint alone."""
    ours, prompt = Pipeline.from_pretrained(checkpoint, numerics="diffusers"), "a plum disc grows on a navy background"
    theirs = CogVideoXPipeline.from_pretrained(checkpoint)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(str(adapter))
    noise = torch.randn(1, 4, 5, 8, 8, generator=torch.Generator().manual_seed(5))
    size = {"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 2}
    before = ours(prompt, latents=noise, progress=False, **size).frames.astype(int)
    load_lora(ours.transformer, adapter / "pytorch_lora_weights.safetensors")
    after = ours(prompt, latents=noise, progress=False, **size).frames.astype(int)
    video = theirs(prompt, latents=noise.transpose(1, 2), max_sequence_length=16, output_type="np", **size).frames[0]
    assert (np.abs(after - (video * 255).round()) <= 1).mean() >= 0.999
    assert np.abs(after - before).mean() > 2


def test_what_it_cannot_judge_is_refused_before_training(tmp_path):
    with pytest.raises(SettingsError, match="num_prompts is 110; there are 108 of plum figures"):
        new_colour.main(tmp_path / "out", num_prompts=110)
    with pytest.raises(TrainingError, match="task is 'text_to_video'; model 'tiny-i2v' has 32 input channels"):
        new_colour.main(tmp_path / "out", model="tiny-i2v")
    assert not (tmp_path / "out" / "run").exists()
