"""One named choice a disagreement: the presets, what changes them, their table, and what is recorded of them."""

import importlib.util
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvx import Pipeline
from cogvx.config import PRESETS
from cogvx.data.video import read_metadata, write_video
from cogvx.diffusion.samplers import SAMPLERS
from cogvx.models.choices import decode_chunks, encode_chunks, first_alone, image_scaling, num_text_tokens
from cogvx.numerics import DIFFUSERS, SAT, Numerics, NumericsError, read_numerics, table

SPEC = importlib.util.spec_from_file_location("numerics_effects", Path(__file__).with_name("numerics_effects.py"))
effects = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(effects)

DOCUMENT = Path(__file__).parents[1] / "docs" / "numerics.md"
INTRODUCTION = """\
# Numerics

The code that the released weights were trained with (SAT) and diffusers disagree in places. Each is a field of
`cogvx.numerics.Numerics`; `SAT` and `DIFFUSERS` are the two presets.

```python
from dataclasses import replace
from cogvx import Pipeline
from cogvx.numerics import SAT

Pipeline.from_pretrained("tiny", numerics="diffusers")
Pipeline.from_pretrained("tiny", numerics=replace(SAT, null_text="encoded"))
```

`cogvx generate --numerics sat,null_text=encoded` is the same on the command line. `"sat"` is the default, because it is
what the weights were trained and first sampled with. An mp4 carries every field, and `cogvx replay` follows them.

"""
EFFECTS = """

## What each does to a clip

From `"sat"`, one field changed to diffusers' at a time, everything else the same: the PSNR between the two clips and
their mean absolute difference in levels of 255. The embedded checkpoint makes "a large red circle moves left on a black
background" with seed 0 in 12 steps; where a field does nothing to it, a random small model of the kind that it concerns
is measured (6 steps, 17 frames; its clips are noise, so the figures tell that there is a difference, not how it looks).
A low PSNR is another clip from the same noise, not a worse one.

"""
NOTES = """

No field, because no clip depends on it: in its last step diffusers' DPM-Solver++ SDE draws noise that it multiplies by
0, SAT draws none. Noise is drawn in fp32 on the CPU in either.

Written by `PYTHONPATH=benchmarks python tests/test_numerics.py`, kept true by `tests/test_numerics.py`.
"""
PROMPT = "a red circle moves left"
QUICK = {"num_inference_steps": 3, "num_frames": 9, "seed": 3, "progress": False}


def document(measured: list[str]) -> str:
    return INTRODUCTION + table() + EFFECTS + "\n".join([*effects.HEADER, *measured]) + NOTES


def measured_rows() -> list[str]:
    """What the document says of each field's effect."""
    after = DOCUMENT.read_text().split("\n".join(effects.HEADER) + "\n")[1]
    return after.split("\n\n")[0].splitlines()


def test_the_document_is_the_table_in_force():
    rows = measured_rows()
    assert DOCUMENT.read_text() == document(rows)
    assert [row.split("`")[1] for row in rows] == [f.name for f in fields(Numerics)]
    assert not any("| equal |" in row or "not measured" in row for row in rows)


LONGER = [pytest.param(name, marks=pytest.mark.soak) for name in ("odd_latents", "last_norm_eps")]


@pytest.mark.parametrize("name", ["sincos_table", "image_latent_1_5", *LONGER])
def test_the_measured_effects_are_measured_again(name):
    stated, found = (
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in (next(row for row in measured_rows() if f"`{name}`" in row), effects.row(name))
    )
    assert stated[:2] + stated[4:] == found[:2] + found[4:]
    assert float(found[2]) == pytest.approx(float(stated[2]), abs=1.0)  # other processors round otherwise
    assert float(found[3]) == pytest.approx(float(stated[3]), rel=0.15, abs=0.005)


def test_the_presets_differ_in_every_field_and_each_field_says_what_it_is():
    assert all(getattr(SAT, f.name) != getattr(DIFFUSERS, f.name) for f in fields(Numerics))
    assert all(f.metadata["meaning"].endswith(".") for f in fields(Numerics))
    with pytest.raises(FrozenInstanceError):
        SAT.null_text = "encoded"


@pytest.mark.parametrize(("value", "expected"), [
    ("sat", SAT),
    ("diffusers", DIFFUSERS),
    (SAT, SAT),
    ("sat,null_text=encoded", replace(SAT, null_text="encoded")),
    ("diffusers,last_norm_eps=1e-6,text_tokens_1_5=224", replace(DIFFUSERS, last_norm_eps=1e-6, text_tokens_1_5=224)),
    ("sat,image_latent_1_5=multiplied,moves=stride", replace(SAT, image_latent_1_5="multiplied", moves="stride")),
    (SAT.as_dict(), SAT),
])  # fmt: skip
def test_numerics_by_name_by_changes_and_by_field(value, expected):
    assert read_numerics(value) == expected


@pytest.mark.parametrize(("value", "message"), [
    ("best", "numerics is 'best'; valid: sat, diffusers, or either with changes, as in sat,null_text=encoded"),
    ("", "numerics is ''; valid: sat"),
    (None, "numerics is 'None'; valid: sat"),
    (["sat"], "valid: sat"),
    ("sat,null_text", "null_text of numerics is ''; valid: 'zeros', 'encoded'"),
    ("sat,null_text=none", "null_text of numerics is 'none'; valid: 'zeros', 'encoded'"),
    ("sat,nil=1", "numerics has no field 'nil'; valid: null_text, zero_snr"),
    ("sat,text_tokens_1_5=225", "text_tokens_1_5 of numerics is 225; valid: 224, 226"),
    ({"null_text": "zeros"}, "numerics does not say zero_snr, rounding"),
    (SAT.as_dict() | {"moves": True}, "moves of numerics is True; valid: 'visited', 'stride'"),
    (SAT.as_dict() | {"other": 1}, "numerics has no field 'other'"),
])  # fmt: skip
def test_what_is_no_choice_is_named(value, message):
    with pytest.raises(NumericsError) as caught:
        read_numerics(value)
    assert message in str(caught.value)


def test_the_named_samplers_are_there():
    assert {SAT.sampler, "dpmpp_2m", "unipc"} < set(SAMPLERS)


@pytest.fixture(scope="module")
def made(small_checkpoint):
    """`made(numerics, kind, dtype, **settings)`: a clip of a small checkpoint."""

    def make(numerics, kind="2b", dtype=None, **settings):
        pipeline = Pipeline.from_pretrained(small_checkpoint(kind), dtype, "cpu", numerics)
        return pipeline(PROMPT, **QUICK | settings)

    return make


def test_unset_settings_are_those_of_the_numerics(made):
    assert made("diffusers").metadata["sampler"] == "ddim"  # what the folder names
    asked = made("sat", sampler="unipc", dynamic_guidance="cosine").metadata
    assert (asked["sampler"], asked["dynamic_guidance"]) == ("unipc", "cosine")


# 1000 / 6 leaves a remainder, and the fifth of 6 timesteps is rounded to 332 and truncated to 333.
@pytest.mark.parametrize(("change", "kind", "settings"), [
    ("null_text=zeros", "2b", {}),
    ("zero_snr=visited", "2b", {}),
    ("rounding=truncated", "2b", {}),
    ("moves=visited", "2b", {}),
    ("sampler=dpmpp_2m_sde", "2b", {}),
    ("dynamic_guidance=wave", "2b", {}),
    ("last_norm_eps=1e-6", "2b", {}),
    ("rope_positions=sliced", "5b", {"width": 96}),
    ("rope_dtype=model", "5b", {"dtype": torch.bfloat16}),
    ("sincos_table=sliced", "2b", {"width": 48}),
    ("sincos_table=sliced", "5b-i2v", {"width": 48, "image": np.full((48, 48, 3), 90, np.uint8)}),
])  # fmt: skip
def test_every_switch_changes_what_is_made(change, kind, settings, made):
    def last_latents(numerics):
        seen = []

        def watch(pipeline, index, timestep, tensors):
            seen.append(tensors["latents"].clone())

        made(numerics, kind, num_inference_steps=6, callback_on_step_end=watch, **settings)
        return seen[-1]

    assert not torch.equal(last_latents("diffusers"), last_latents(f"diffusers,{change}"))


def test_positions_of_the_trained_size_are_the_same_in_both(made):
    for kind, choice in (("5b", "rope_positions=sliced"), ("2b", "sincos_table=sliced")):
        both = (made(numerics, kind, num_frames=17).frames for numerics in ("diffusers", f"diffusers,{choice}"))
        assert np.array_equal(*both)


def test_a_sliced_table_that_is_too_short_is_named(made):
    message = "sincos_table of numerics is 'sliced'; the video has 100 patches, and the table that it slices has 60"
    with pytest.raises(NumericsError, match=message):
        made("diffusers,sincos_table=sliced", num_frames=17, width=80, height=64)


def test_what_the_choices_mean_for_the_released_models():
    tokens = {name: [num_text_tokens(preset.transformer, n) for n in (SAT, DIFFUSERS)]
              for name, preset in PRESETS.items() if not name.startswith("tiny")}  # fmt: skip
    assert tokens.pop("1.5-5b") == tokens.pop("1.5-5b-i2v") == [224, 226]
    assert set(map(tuple, tokens.values())) == {(226, 226)}
    vae = PRESETS["1.5-5b"].vae, PRESETS["5b-i2v"].vae
    scalings = [image_scaling(config, numerics) for config in vae for numerics in (SAT, DIFFUSERS)]
    assert scalings == ["unscaled", "divided", "multiplied", "multiplied"]
    assert decode_chunks(41, SAT) == [5] + [4] * 9 and encode_chunks(49, SAT) == [49]
    assert [first_alone(n, SAT) for n in (1, 2, 13, 15, 22)] == [True, False, True, False, False]
    assert first_alone(15, DIFFUSERS) and not first_alone(22, DIFFUSERS)
    others = decode_chunks(13, SAT), decode_chunks(41, DIFFUSERS), encode_chunks(49, DIFFUSERS)
    assert others == (None, None, None)  # the VAE's own plans, which are diffusers'


def test_latents_are_rounded_between_steps_where_the_model_computes_in_less(made):
    def seen(numerics, dtype):
        kept = []

        def watch(pipeline, index, timestep, tensors):
            kept.append(tensors["latents"].clone())

        made(numerics, dtype=dtype, callback_on_step_end=watch)
        return kept

    for latents in seen("diffusers", torch.bfloat16):
        assert torch.equal(latents, latents.bfloat16().float())
    precise = seen("diffusers,latents_between_steps=fp32", torch.bfloat16)
    assert not any(torch.equal(latents, latents.bfloat16().float()) for latents in precise)
    both = seen("diffusers", torch.float32), seen("diffusers,latents_between_steps=fp32", torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))


def test_a_clip_of_four_frames_a_latent_has_the_frames_that_were_asked_for(small_checkpoint):
    sat, alone = (Pipeline.from_pretrained(small_checkpoint("2b"), device="cpu", numerics=f"sat,odd_latents={choice}")
                  for choice in ("four_each", "first_alone"))  # fmt: skip
    z = torch.randn(1, 4, 15, 1, 1, generator=torch.Generator().manual_seed(3))
    clips = [pipeline.decode(z)[0] for pipeline in (sat, alone)]
    assert [len(clip) for clip in clips] == [57, 57] and not np.array_equal(*clips)
    assert np.array_equal(*(pipeline.decode(z[:, :, :13])[0] for pipeline in (sat, alone)))


def test_zeros_stand_for_no_text_but_not_for_a_negative_prompt(made, small_checkpoint):
    given = made("diffusers", negative_prompt_embeds=torch.zeros(1, 16, 24))
    assert np.array_equal(made("diffusers,null_text=zeros").frames, given.frames)
    both = (made(numerics, negative_prompt="blue").frames for numerics in ("diffusers,null_text=zeros", "diffusers"))
    assert np.array_equal(*both)


def test_a_replay_follows_every_field(small_checkpoint, run_command, tmp_path):
    file, numerics = tmp_path / "a.mp4", "sat,rounding=rounded,null_text=encoded"
    words = ("--model", small_checkpoint("2b"), "--num-frames", 9, "--num-inference-steps", 3, "--no-progress")
    status, _, err = run_command("generate", PROMPT, "-o", file, *words, "--numerics", numerics, "--guidance-scale",
                                 "6,4.5,1")  # fmt: skip
    assert status == 0, err
    metadata = read_metadata(file)
    assert metadata["numerics"] == read_numerics(numerics).as_dict()
    assert metadata["guidance_scale"] == [6.0, 4.5, 1.0] and metadata["dynamic_guidance"] == "constant"
    status, out, err = run_command("replay", file, "--no-progress")
    assert status == 0 and "frames equal, bytes equal" in out and err == "", err
    write_video(file, np.zeros((9, 48, 64, 3), np.uint8), 8, metadata | {"numerics": {"null_text": "zeros"}})
    assert "cannot be replayed: in its metadata numerics does not say zero_snr" in run_command("replay", file)[2]


def test_a_replay_of_a_video_from_before_takes_the_name_alone(small_checkpoint, run_command, tmp_path, made):
    clip = made("diffusers")
    old = clip.metadata | {"numerics": "diffusers", "dynamic_guidance": None}
    write_video(tmp_path / "a.mp4", clip.frames, 8, old)
    status, out, err = run_command("replay", tmp_path / "a.mp4", "--no-progress")
    assert status == 0 and "frames equal" in out, err


if __name__ == "__main__":
    DOCUMENT.write_text(document(list(effects.rows())))
    print(f"{DOCUMENT} written", file=sys.stderr)
