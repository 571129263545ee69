"""Tables of modulation: the same results without the weights that made them, and clear words where those are missed."""

import pytest
import torch

from cogvx import Pipeline
from cogvx.config import PRESETS, TransformerConfig
from cogvx.models import ExpertTransformer

TIMESTEPS = [999, 500, 37]


def inputs(config, timestep, batch=2):
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(batch, config.in_channels, 2, 4, 6, generator=generator)
    text = torch.randn(batch, 7, config.text_embed_dim, generator=generator)
    return latents, text, torch.full((batch,), timestep)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["2b", "5b", "1.5-5b-i2v"])
def test_a_table_changes_no_bit(preset):
    torch.manual_seed(0)
    config = TransformerConfig(**{**vars(PRESETS[preset].transformer), "num_layers": 2, "num_attention_heads": 3})
    model = ExpertTransformer(config)
    for batch in (1, 2):
        table = model.tabulate(TIMESTEPS, batch)
        for timestep in TIMESTEPS:
            given = inputs(config, timestep, batch)
            assert torch.equal(model(*given, table.at(timestep)), model(*given))


@torch.no_grad()
def test_samples_of_a_batch_may_have_timesteps_of_their_own(published):
    model = ExpertTransformer.from_pretrained(published / "2b")
    latents, text, _ = inputs(model.config, 0)
    table = model.tabulate(TIMESTEPS)
    mixed = model(latents, text, torch.tensor([37, 999]))
    torch.testing.assert_close(model(latents, text, torch.tensor([37, 999]), table.at(37, 999)), mixed)
    assert not torch.allclose(model(latents, text, torch.tensor([37, 37]))[1], mixed[1])


@pytest.mark.parametrize(
    ("name", "in_blocks", "elsewhere"),
    [
        ("2b", 354_585_600, 1_969_920 + 1_246_208),  # of norm1 and norm2; of norm_out and time_embedding
        ("5b", 794_271_744, 3_151_872 + 1_836_032),
        ("1.5-5b-i2v", 794_271_744, 3_151_872 + 1_836_032 + 525_312),  # and ofs_embedding
    ],
)
def test_released_are_a_fifth_of_2b_and_a_seventh_of_5b(name, in_blocks, elsewhere):
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        model = ExpertTransformer(PRESETS[name].transformer)
    before, before_in_blocks = count(model), count(model.transformer_blocks)
    model.release_modulation([999, 499])
    assert before_in_blocks - count(model.transformer_blocks) == in_blocks
    assert before - count(model) == in_blocks + elsewhere
    config = model.config
    assert model.table.blocks.shape == (2, config.num_layers, 2, 3, 2, config.width)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["5b", "1.5-5b-i2v"])
def test_a_released_model_computes_the_same_and_knows_its_limits(published, tmp_path, kind):
    model = ExpertTransformer.from_pretrained(published / kind)
    given = inputs(model.config, 500, batch=1)
    expected, other = model(*given), inputs(model.config, 501)
    model.release_modulation(TIMESTEPS)
    assert torch.equal(model(*given), expected)
    assert model.tabulate([37, 999]) is model.table
    assert torch.equal(model.bfloat16().float()(*given).isfinite(), torch.ones_like(expected, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"timestep 501 is not among the 3 whose modulation was kept \(999, 500, 37\)"):
        model(*other)
    with pytest.raises(ValueError, match="timestep 12 is not among"):
        model.tabulate([999, 12])
    with pytest.raises(ValueError, match="were released, so it cannot be trained"):
        model.train()
    with pytest.raises(ValueError, match="were released, so it cannot be saved"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert not model.eval().training


@torch.no_grad()
def test_a_released_model_keeps_one_ofs(published):
    model = ExpertTransformer.from_pretrained(published / "1.5-5b-i2v")
    given = inputs(model.config, 37, batch=1)
    usual, other = model(*given), model(*given, ofs=0.5)
    table = model.tabulate(TIMESTEPS, ofs=0.5)
    assert torch.equal(model(*given, table.at(37)), other)
    model.release_modulation(TIMESTEPS)
    assert torch.equal(model(*given), usual) and torch.equal(model(*given, ofs=2.0), usual)
    assert model.tabulate(TIMESTEPS) is model.table
    for call in (lambda: model(*given, ofs=0.5), lambda: model.tabulate(TIMESTEPS, ofs=0.5)):
        with pytest.raises(ValueError, match=r"ofs is 0\.5, but the modulation was kept for 2\.0"):
            call()


def test_a_released_pipeline_makes_the_same_clip_with_its_number_of_steps(small_checkpoint):
    settings = {"num_frames": 9, "seed": 3, "guidance_scale": 1.0, "progress": False}
    pipeline = Pipeline.from_pretrained(small_checkpoint("5b"), numerics="diffusers")
    expected = pipeline("a red circle", num_inference_steps=2, **settings)
    pipeline.release_modulation(num_inference_steps=2)
    assert (pipeline("a red circle", num_inference_steps=2, **settings).frames == expected.frames).all()
    with pytest.raises(ValueError, match=r"timestep 666 is not among the 2 .*\(999, 499\)"):
        pipeline("a red circle", num_inference_steps=3, **settings)
