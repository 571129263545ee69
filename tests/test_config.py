import json
import math

import pytest
import torch

from cogvx.config import MAX_SIZE, PRESETS, ScheduleConfig, TransformerConfig, VAEConfig
from cogvx.models import ExpertTransformer

ROPE = {"use_rotary_positional_embeddings": True}
LEARNED = {"use_learned_positional_embeddings": True, **ROPE}
PARTS = [(name, part) for name in PRESETS for part in ("transformer", "vae", "schedule")]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_preset_survives_its_file(name, part):
    config = getattr(PRESETS[name], part)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_files_as_published_are_read():
    # The fields of the released 5B, with what its writer adds.
    transformer = TransformerConfig.from_dict(
        {
            "_class_name": "CogVideoXTransformer3DModel", "_diffusers_version": "0.31.0.dev0",
            "activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 64, "dropout": 0.0,
            "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 16, "max_text_seq_length": 226,
            "norm_elementwise_affine": True, "norm_eps": 1e-05, "num_attention_heads": 48, "num_layers": 42,
            "out_channels": 16, "patch_size": 2, "sample_frames": 49, "sample_height": 60, "sample_width": 90,
            "spatial_interpolation_scale": 1.875, "temporal_compression_ratio": 4,
            "temporal_interpolation_scale": 1.0, "text_embed_dim": 4096, "time_embed_dim": 512,
            "timestep_activation_fn": "silu", "use_rotary_positional_embeddings": True,
        }
    )  # fmt: skip
    assert transformer == PRESETS["5b"].transformer
    schedule = ScheduleConfig.from_dict(
        {
            "_class_name": "CogVideoXDPMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "beta_start": 0.00085, "clip_sample": False, "clip_sample_range": 1.0, "num_train_timesteps": 1000,
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "sample_max_value": 1.0,
            "set_alpha_to_one": True, "snr_shift_scale": 1, "steps_offset": 0, "timestep_spacing": "trailing",
            "trained_betas": None,
        }
    )  # fmt: skip
    assert schedule == ScheduleConfig(snr_shift_scale=1.0, sampler="dpmpp_2m_sde")
    assert schedule.to_dict()["_class_name"] == "CogVideoXDPMScheduler"


def test_the_released_1_5_is_read():
    # The fields of its image-to-video model that differ from the 5B's; both sizes are in use.
    content = PRESETS["5b"].transformer.to_dict() | {
        "in_channels": 32, "ofs_embed_dim": 512, "patch_bias": False, "patch_size_t": 2, "sample_frames": 81,
        "sample_height": 300, "sample_width": 300,
    }  # fmt: skip
    config = TransformerConfig.from_dict(content)
    assert config == PRESETS["1.5-5b-i2v"].transformer
    other = TransformerConfig.from_dict(content | {"sample_height": 96, "sample_width": 170})
    for size in (config, other):
        assert size.latent_size == (96, 170) and size.trained_grid == (11, 48, 85)


def test_the_largest_sizes_still_describe_a_model():
    largest = dict.fromkeys(("in_channels", "out_channels", "text_embed_dim", "time_embed_dim"), MAX_SIZE)
    patches = dict.fromkeys(("patch_size", "patch_size_t", "sample_height", "sample_width"), 64)
    width = {"num_layers": 1, "num_attention_heads": 2**10, "attention_head_dim": 2**10}
    config = TransformerConfig(**largest, **patches, **width, **ROPE, ofs_embed_dim=MAX_SIZE)
    with torch.device("meta"):
        assert sum(p.numel() for p in ExpertTransformer(config).parameters()) > 2**58


def test_grids_of_the_1_0_models():
    for name in ("2b", "5b", "5b-i2v"):
        config = PRESETS[name].transformer
        assert (config.trained_grid, config.num_positions) == ((13, 30, 45), 226 + 17_550)


def test_time_is_halved_at_the_first_two_levels():
    assert [VAEConfig().halves_time(level) for level in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (TransformerConfig, {"dropout": 0.1}, "dropout is 0.1, which is not supported yet; supported is 0.0"),
        (TransformerConfig, {"patch_size_t": 2}, "patch_size_t is 2 without use_rotary_positional_embeddings"),
        (TransformerConfig, {"patch_size_t": True}, "patch_size_t is True; it must be of type int"),
        (TransformerConfig, {"patch_size_t": 65, **ROPE}, "patch_size_t is 65; it must be at most 64"),
        (TransformerConfig, {"ofs_embed_dim": 256}, "ofs_embed_dim is 256; it must be None or time_embed_dim 512"),
        (TransformerConfig, {"use_learned_positional_embeddings": True}, "use_learned_positional_embeddings is True"),
        (TransformerConfig, LEARNED | {"patch_size_t": 2}, "patch_size_t is 2 with use_learned_positional_embeddings"),
        (TransformerConfig, LEARNED | {"sample_frames": 10**6}, "sample_frames, .* 337500226 positions; .* at most"),
        (TransformerConfig, {"attention_head_dim": 2**19}, "the width is 15728640; it must be at most 1048576"),
        (VAEConfig, {"invert_scale_latents": 1}, "invert_scale_latents is 1; it must be of type bool"),
        (TransformerConfig, {"freq_shift": False}, "freq_shift is False"),
        (TransformerConfig, {"colour": "red"}, "colour is 'red', a field that is not known"),
        (TransformerConfig, {"num_layers": "30"}, "num_layers is '30'; it must be of type int"),
        (TransformerConfig, {"num_layers": True}, "num_layers is True; it must be of type int"),
        (TransformerConfig, {"num_layers": 0}, "num_layers is 0; it must be between 1 and"),
        (TransformerConfig, {"num_layers": 257}, "num_layers is 257; it must be at most 256"),
        (TransformerConfig, {"num_layers": 10**5000}, "num_layers is .*; it must be between 1 and"),
        (TransformerConfig, {"norm_eps": math.nan}, "norm_eps is nan; it must be a number above 0"),
        (TransformerConfig, {"norm_eps": 10**400}, "norm_eps is .*; it must be a number above 0"),
        (TransformerConfig, {"attention_head_dim": 59}, "the width is 1770; the positions need .* 16, try 1776"),
        (
            TransformerConfig,
            {"attention_head_dim": 59, "use_rotary_positional_embeddings": True},
            "attention_head_dim is 59; the positions need a multiple of 16, try 64",
        ),
        (TransformerConfig, {"sample_width": 89}, "sample_width is 89, which is no multiple of patch_size 2"),
        (TransformerConfig, {"_class_name": "AutoencoderKLCogVideoX"}, "_class_name is 'AutoencoderKLCogVideoX', not"),
        (VAEConfig, {"use_quant_conv": True}, "use_quant_conv is True, which is not supported yet"),
        (VAEConfig, {"latents_mean": [0.0]}, r"latents_mean is \[0.0\], which is not supported yet"),
        (VAEConfig, {"block_out_channels": [32, 64]}, "block_out_channels has 2 entries; it must have 4"),
        (VAEConfig, {"block_out_channels": [32, 64, 64, -32]}, "block_out_channels is -32; it must be between"),
        (VAEConfig, {"block_out_channels": [32, 64, 64, "x"]}, "block_out_channels is 'x'; it must be of type int"),
        (VAEConfig, {"block_out_channels": 32}, "block_out_channels is 32; it must be of type list of int"),
        (VAEConfig, {"norm_num_groups": 33}, "norm_num_groups is 33, which does not divide 128 channels"),
        (VAEConfig, {"temporal_compression_ratio": 8}, "temporal_compression_ratio is 8; supported is 4"),
        (ScheduleConfig, {"prediction_type": "epsilon"}, "prediction_type is 'epsilon', which is not supported yet"),
        (ScheduleConfig, {"beta_end": 1.5}, "beta_end is 1.5; it must be between beta_start 0.00085 and 1"),
        (ScheduleConfig, {"sampler": "ddim"}, "sampler is no published field"),
    ],
)
def test_a_bad_field_is_named(config, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        config.from_dict(config().to_dict() | changes)


def test_a_missing_field_that_others_take_otherwise_is_named():
    content = ScheduleConfig().to_dict()
    del content["timestep_spacing"]
    with pytest.raises(ValueError, match="timestep_spacing is missing; supported is 'trailing'"):
        ScheduleConfig.from_dict(content)


def test_no_object_is_no_config():
    for content in ([], None, "x"):
        for config in (TransformerConfig, VAEConfig, ScheduleConfig):
            with pytest.raises(ValueError, match="not an object with fields"):
                config.from_dict(content)


def test_an_unknown_sampler_is_named():
    with pytest.raises(ValueError, match="sampler is 'euler'; it must be one of ddim, dpmpp_2m_sde"):
        ScheduleConfig(sampler="euler")
