"""The table and the JSON of an evaluation, and what `evaluate` refuses before it loads anything."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from cogvx.config import PRESETS
from cogvx.data.shapes import ALL_SCENES
from cogvx.eval.generation import GROUPS, WORDS, Share
from cogvx.eval.reconstruction import Reconstruction
from cogvx.eval.report import Report, evaluate
from cogvx.models.text import TextEncoder, read_vocabulary
from cogvx.models.transformer import ExpertTransformer
from cogvx.models.vae import CausalVAE
from cogvx.pipeline import Pipeline
from cogvx.settings import Configs
from cogvx.train.tokenizer import build_tokenizer

SETTINGS = {"model": "tiny", "num_prompts": 480, "num_clips": 2, "seed": 0, "steps": 50}
SETTINGS |= {"guidance_scale": 6.0, "compress": True}


@pytest.fixture
def report() -> Report:
    adherence = {group: {word: Share(228, 240) for word in WORDS} for group in ("seen", "held out")}
    adherence["all"] = {word: Share(456, 480) for word in WORDS}
    return Report(SETTINGS, adherence, Reconstruction((29.0, 33.0)), 12.34)


def test_table_shows_every_figure(report):
    lines = str(report).splitlines()
    assert lines[0].startswith("480 prompts, 50 steps, guidance 6, seed 0; judged after H.264")
    assert "| | seen (240) | held out (240) | all (480) | at least |" in lines
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ") and "%" in line}
    assert tuple(rows) == WORDS
    assert rows["motion"].endswith("| 95.0 % (92.7 to 96.6) | 90 % |") and rows["size"].endswith("(92.7 to 96.6) |  |")
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "mean PSNR 31.00 dB, lowest 29.00 dB; at least 30 dB" in lines[-1]


def test_parts_left_out_are_left_out(report):
    assert "PSNR" not in str(replace(report, reconstruction=None))
    assert "|" not in str(replace(report, adherence=None))
    assert replace(report, adherence=None).as_dict()["adherence"] is None
    assert replace(report, adherence=None, reconstruction=None).reached


@pytest.mark.parametrize("word", [word for word in WORDS if word != "size"])
def test_one_low_figure_is_not_enough(report, word):
    assert report.reached
    low = {**report.adherence, "all": {**report.adherence["all"], word: Share(400, 480)}}
    assert not replace(report, adherence=low).reached
    assert not replace(report, reconstruction=Reconstruction((29.0, 30.9))).reached


def test_json_is_whole_and_valid(report, tmp_path):
    nothing_judged = {group: {**report.adherence[group], "size": Share(0, 0)} for group in GROUPS}
    (tmp_path / "evaluation.json").write_text("older")
    replace(report, adherence=nothing_judged).save(tmp_path)
    text = (tmp_path / "evaluation.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["settings"] == SETTINGS and content["reached"] is True
    assert content["adherence"]["all"]["size"]["share"] is None
    assert content["adherence"]["seen"]["shape"]["interval_95"] == pytest.approx([0.9146, 0.9712], abs=2e-3)
    assert content["psnr_db"] == {"mean": 31.0, "clips": [29.0, 33.0]}
    assert "| size | not judged | not judged | not judged |  |" in (tmp_path / "evaluation.md").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evaluation.json", "evaluation.md"]


def test_a_failed_write_keeps_the_older_file(report, tmp_path, monkeypatch):
    (tmp_path / "evaluation.json").write_text("older")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        report.save(tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("evaluation.json", "older")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_prompts": 7}, "num_prompts is 7, which is not 0 or an even number; nearest: 6"),
        ({"num_prompts": -2}, "num_prompts is -2, which is not 0 or an even number; nearest: 0"),
        ({"num_clips": -1}, "num_clips is -1, which is less than 0"),
        ({"steps": 0}, "steps is 0, which is less than 1"),
        ({"batch_size": 0}, "batch_size is 0, which is less than 1"),
    ],
)
def test_bad_arguments_are_refused_first(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model="no such folder", **arguments)


def test_bad_outputs_are_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output is '.*file', which cannot be made a folder"):
        evaluate(model="no such folder", output=tmp_path / "file")
    (tmp_path / "evaluation.json").mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*evaluation\.json: it is a folder"):
        evaluate(model="no such folder", output=tmp_path)


def test_a_model_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        evaluate(model=str(tmp_path / "no such folder"), output=tmp_path / "out")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random model that makes clips of the world's size."""
    torch.manual_seed(0)
    return untrained_model(tmp_path_factory.mktemp("untrained"), PRESETS["tiny"])


def untrained_model(folder, preset):
    size = build_tokenizer(folder / "words", {word for scene in ALL_SCENES for word in scene.prompt.split()}, 32)
    vocabulary, num_sentinels = read_vocabulary(folder / "words", folder)
    t5 = T5Config(vocab_size=size, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    transformer = replace(preset.transformer, num_layers=1, num_attention_heads=1, text_embed_dim=32)
    vae = replace(preset.vae, block_out_channels=(8, 8, 8, 8))
    pipeline = Pipeline(
        ExpertTransformer(transformer),
        CausalVAE(vae),
        TextEncoder(T5EncoderModel(t5).eval(), vocabulary, num_sentinels, 32),
        Configs(transformer, vae, preset.schedule),
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def test_a_model_that_takes_images_is_given_first_frames_and_held_to_what_it_keeps(tmp_path):
    model = untrained_model(tmp_path, PRESETS["tiny-i2v"])
    report = evaluate(str(model), num_prompts=2, num_clips=0, steps=1, progress=False, output=tmp_path / "out")
    assert tuple(report.adherence["all"]) == ("colour", "shape", "place", "kept", "motion")
    assert report.adherence["all"]["kept"] == Share(0, 2) and not report.reached  # it never saw a clip
    assert "shape and place (at most 2 of 64 pixels from there)" in str(report)
    assert "| kept | 0.0 % (0.0 to 79.3) | 0.0 % (0.0 to 79.3) | 0.0 % (0.0 to 65.8) | 90 % |" in str(report)
    lines = [json.loads(line) for line in (tmp_path / "out" / "clips.jsonl").read_text().splitlines()[1:]]
    assert all(0 < place < 64 for line in lines for place in line["given"])
    good = {group: {**shares, "kept": Share(9, 10)} for group, shares in report.adherence.items()}
    assert replace(report, adherence=good).reached


def test_a_model_is_evaluated_from_its_folder(untrained, tmp_path):
    settings = {"num_prompts": 4, "num_clips": 2, "steps": 2, "batch_size": 3, "progress": False}
    report = evaluate(str(untrained), **settings, output=tmp_path / "out")
    shares = report.adherence["all"]
    assert shares["all right"] == Share(0, 4) and not report.reached  # it never saw a clip
    assert len(report.reconstruction.psnr) == 2 and 0 < report.reconstruction.mean < 20
    assert len(report.settings["model_sha256"]) == 64 and report.settings["sampler"] == "dpmpp_2m_sde"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"clips.jsonl", "evaluation.json", "evaluation.md"}
    assert (tmp_path / "out" / "evaluation.md").read_text() == str(report)
    again = evaluate(str(untrained), **settings, output=tmp_path / "out")  # from the log
    assert again.adherence == report.adherence and again.reconstruction == report.reconstruction
    with pytest.raises(ValueError, match="of other settings"):
        evaluate(str(untrained), **settings, output=tmp_path / "out", guidance_scale=3.0)
