"""Every setting that does not fit is named, with its value and the nearest valid one, from the configs alone."""

import json
import shutil

import pytest

from cogvx.config import PRESETS
from cogvx.models import CheckpointError
from cogvx.numerics import SAT
from cogvx.settings import Configs, Settings, SettingsError, read_configs

PRESET = PRESETS["2b"]
CONFIGS = Configs(PRESET.transformer, PRESET.vae, PRESET.schedule)  # 49 frames of 480 x 720


def test_unset_settings_are_what_the_checkpoint_says():
    known = Settings("a cat").resolve(CONFIGS)
    assert (known.num_frames, known.height, known.width, known.sampler) == (49, 480, 720, "dpmpp_2m_sde")
    assert known.latent_shape(CONFIGS) == (16, 13, 60, 90)
    assert known.resolve(CONFIGS) == known  # the drawn seed too
    assert known.seed != Settings("a cat").resolve(CONFIGS).seed


def test_the_1_5_models_make_their_trained_size():
    for name in ("1.5-5b", "1.5-5b-i2v"):
        preset = PRESETS[name]
        known = Settings("a cat").resolve(Configs(preset.transformer, preset.vae, preset.schedule))
        assert (known.num_frames, known.height, known.width) == (81, 768, 1360)


@pytest.mark.parametrize("num_frames", [1, 9, 17, 25, 33, 41, 49])
def test_as_many_frames_as_asked(num_frames):
    known = Settings("a cat", num_frames=num_frames).resolve(CONFIGS)
    assert known.num_frames == num_frames and known.latent_shape(CONFIGS)[1] == (num_frames - 1) // 4 + 1


@pytest.mark.parametrize(("wrong", "message"), [
    ({"num_frames": 0}, "num_frames is 0; this model makes 8N+1 frames from 1 to 49, the nearest is 1"),
    ({"num_frames": 7}, "num_frames is 7; this model makes 8N+1 frames from 1 to 49, the nearest is 9"),
    ({"num_frames": 48}, "num_frames is 48; this model makes 8N+1 frames from 1 to 49, the nearest is 49"),
    ({"num_frames": 57}, "num_frames is 57; this model makes 8N+1 frames from 1 to 49, the nearest is 49"),
    ({"num_frames": -7}, "num_frames is -7; this model makes 8N+1 frames from 1 to 49, the nearest is 1"),
    ({"num_frames": 9.0}, "num_frames is 9.0; it must be a whole number"),
    ({"num_frames": True}, "num_frames is True; it must be a whole number"),
    ({"height": 470}, "height is 470; it must be a multiple of 16 pixels, the nearest is 464"),
    ({"width": 8}, "width is 8; it must be a multiple of 16 pixels, the nearest is 16"),
    ({"width": -16}, "width is -16; it must be a multiple of 16 pixels, the nearest is 16"),
    ({"height": "480"}, "height is '480'; it must be a whole number"),
    ({"num_inference_steps": 0}, "num_inference_steps must be from 1 to 1000, not 0; nearest: 1"),
    ({"num_inference_steps": 1001}, "num_inference_steps must be from 1 to 1000, not 1001; nearest: 1000"),
    ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a finite number from 0"),
    ({"guidance_scale": float("inf")}, "guidance_scale is inf; it must be a finite number from 0"),
    ({"guidance_scale": -1.0}, "guidance_scale is -1.0; it must be a finite number from 0"),
    ({"guidance_scale": "6"}, "guidance_scale is '6'; it must be a finite number from 0"),
    ({"dynamic_guidance": "on"}, "dynamic_guidance is 'on'; valid: None, 'constant', 'wave', 'cosine'"),
    ({"guidance_scale": []}, "guidance_scale holds 0 scales; it must hold one for each of the 50 steps of num_inf"),
    ({"guidance_scale": [6.0] * 49}, "guidance_scale holds 49 scales; it must hold one for each of the 50 steps"),
    ({"guidance_scale": [6.0, float("nan")]}, "guidance_scale of step 2 is nan; it must be a finite number from 0"),
    ({"guidance_scale": (6, "x")}, "guidance_scale of step 2 is 'x'; it must be a finite number from 0"),
    ({"guidance_scale": [6.0] * 50, "dynamic_guidance": "wave"}, "dynamic_guidance is 'wave'; with a guidance_scale"),
    ({"sampler": "euler"}, "sampler is 'euler'; valid: 'ddim', 'dpmpp_2m_sde', 'dpmpp_2m', 'unipc'"),
    ({"seed": -1}, f"seed is -1; it must be from 0 to {2**63 - 1}"),
    ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
    ({"prompt": ""}, "prompt is ''; say in words what the video shows"),
    ({"prompt": " \n"}, "prompt is ' \\n'; say in words what the video shows"),
    ({"prompt": ["a"]}, "prompt is ['a']; say in words what the video shows"),
    ({"negative_prompt": None}, "negative_prompt is None; it must be a text, '' for none"),
])  # fmt: skip
def test_what_does_not_fit_is_named_with_what_would(wrong, message):
    with pytest.raises(SettingsError) as caught:
        Settings(**{"prompt": "a cat", **wrong}).resolve(CONFIGS)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("form", "at", "scales"), [
    ("constant", [(999, 0), (19, 49)], [6, 6]),
    ("cosine", [(999, 0), (499, 25), (199, 40)], [1, 1.01445, 2.45410]),  # half turns of 0, 0.5^5, 0.8^5
    ("wave", [(100, 45), (50, 47), (25, 48), (0, 49)], [7, 1, 1.01445, 7]),  # of (-1)^5, 0, 0.5^5, 1
])  # fmt: skip
def test_the_scale_of_each_step(form, at, scales):
    known = Settings("a cat", dynamic_guidance=form).resolve(CONFIGS)
    assert [known.scale_at(*step) for step in at] == pytest.approx(scales, abs=1e-4)


def test_a_list_holds_the_scale_of_each_step():
    known = Settings("a cat", num_inference_steps=3, guidance_scale=(7, 2.5, 0.0)).resolve(CONFIGS)
    assert [known.scale_at(t, i) for i, t in enumerate((999, 666, 332))] == [7, 2.5, 1.0]  # up to 1 is no guidance
    assert known.is_guided and known.resolve(CONFIGS) == known
    assert known.dynamic_guidance == "constant" == known.resolve(CONFIGS, SAT).dynamic_guidance
    assert not Settings("a cat", num_inference_steps=2, guidance_scale=[1, 0.5]).resolve(CONFIGS).is_guided


def spoil(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("file", "changes", "message"), [
    ("transformer/config.json", {"in_channels": 12}, "in_channels is 12 in the transformer's config, the VAE's"),
    ("transformer/config.json", {"out_channels": 8}, "latent_channels is 4; it must be as many"),
    ("transformer/config.json", {"temporal_compression_ratio": 8}, "temporal_compression_ratio is 8 in"),
    ("transformer/config.json", {"num_layers": 0}, "num_layers is 0; it must be between 1 and"),
    ("scheduler/scheduler_config.json", {"beta_start": 1e-30, "beta_end": 1e-30}, "give no falling schedule"),
    ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction_type is 'epsilon'"),
])  # fmt: skip
def test_configs_that_do_not_work_are_refused(file, changes, message, small_checkpoint, tmp_path):
    shutil.copytree(small_checkpoint("2b"), tmp_path / "x")
    spoil(tmp_path / "x" / file, **changes)
    with pytest.raises(CheckpointError) as caught:
        read_configs(tmp_path / "x")
    assert message in str(caught.value)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_without_a_component_is_no_checkpoint(component, small_checkpoint, tmp_path):
    shutil.copytree(small_checkpoint("2b"), tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / component)
    with pytest.raises(CheckpointError, match=f"the folder {component} is missing in it"):
        read_configs(tmp_path / "x")
