"""The transformer against diffusers', on weights that diffusers saved, and by itself."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from cogvx.config import PRESETS, TransformerConfig
from cogvx.models import ExpertTransformer

# Latent T, H, W. Trained are 3, 8, 12.
GRIDS = {
    "trained": (3, 8, 12),
    "fewer frames": (1, 8, 12),
    "more frames": (5, 8, 12),
    "portrait": (3, 12, 8),
    "wide": (2, 6, 20),
    "larger": (2, 20, 30),
    "one patch": (1, 2, 2),
}


def inputs(config: TransformerConfig, grid: tuple[int, int, int], num_text: int = 7):
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, config.in_channels, *grid, generator=generator)
    text = torch.randn(2, num_text, config.text_embed_dim, generator=generator)
    return latents, text, torch.tensor([999, 37])


def theirs(model: CogVideoXTransformer3DModel, latents, text, timestep):
    config, rope = model.config, None
    if config.use_rotary_positional_embeddings:
        num_frames, height, width = latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2
        region = get_resize_crop_region_for_grid((height, width), config.sample_width // 2, config.sample_height // 2)
        rope = get_3d_rotary_pos_embed(config.attention_head_dim, region, (height, width), num_frames)
    out = model(latents.transpose(1, 2), text, timestep, image_rotary_emb=rope, return_dict=False)[0]
    return out.transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_computes_what_diffusers_computes(published, relative_error, kind, grid):
    ours = ExpertTransformer.from_pretrained(published / kind)
    oracle = CogVideoXTransformer3DModel.from_pretrained(published / kind)
    given = inputs(ours.config, grid)
    assert relative_error(ours(*given), theirs(oracle, *given)) <= 1e-5


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_learns_what_diffusers_learns(published, kind):
    models = (
        ExpertTransformer.from_pretrained(published / kind),
        CogVideoXTransformer3DModel.from_pretrained(published / kind),
    )
    given = inputs(models[0].config, (3, 8, 12))
    for model, run in zip(models, (models[0], lambda *args: theirs(models[1], *args)), strict=True):
        model.requires_grad_().zero_grad()
        run(*given).square().mean().backward()
    expected = dict(models[1].named_parameters())
    largest = max(parameter.grad.norm() for parameter in expected.values())
    for name, parameter in models[0].named_parameters():
        difference = (parameter.grad - expected[name].grad).norm()
        # Where the gradient is 0 but for rounding (a bias of k), only its size beside the others means anything.
        assert difference <= 1e-4 * expected[name].grad.norm() + 1e-6 * largest, name


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet(published):
    model = ExpertTransformer.from_pretrained(published / "5b")
    latents, text, timestep = inputs(model.config, (3, 8, 12))
    alone = model(latents[1:], text[1:], timestep[1:])
    torch.testing.assert_close(model(latents, text, timestep)[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "count"), [("2b", 1_693_783_872), ("5b", 5_570_283_072)])
def test_presets_have_the_released_tensors(name, count):
    config = PRESETS[name].transformer
    with torch.device("meta"):
        ours, oracle = ExpertTransformer(config), CogVideoXTransformer3DModel.from_config(config.to_dict())
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, oracle)]
    assert shapes[0] == shapes[1]


def test_a_fresh_model_is_the_identity_inside_and_learns_everywhere():
    torch.manual_seed(0)
    config = TransformerConfig(**{**vars(PRESETS["tiny"].transformer), "num_layers": 2})
    model = ExpertTransformer(config).init_for_training()
    given = inputs(config, (2, 4, 4))
    before = model(*given)
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.ff.net[2].weight)  # behind a gate of 0, hence of no effect
    torch.testing.assert_close(model(*given), before)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):  # the first step opens the gates, the second reaches what lies behind them
        optimizer.zero_grad()
        model(*given).square().mean().backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0]
    # A bias of k shifts all scores of a query alike, so that the softmax ignores it; of its norm, only on text.
    assert [name for name in still if "to_k.bias" not in name and "norm_k.bias" not in name] == []


def test_trains_under_bf16_autocast():
    torch.manual_seed(0)
    config = TransformerConfig(**{**vars(PRESETS["tiny"].transformer), "num_layers": 1})
    model = ExpertTransformer(config).init_for_training()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs(config, (2, 4, 4)))
    out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_half_precision_weights_take_fp32_latents(published, relative_error):
    model = ExpertTransformer.from_pretrained(published / "5b", dtype=torch.bfloat16)
    given = inputs(model.config, (3, 8, 12))
    exact = ExpertTransformer.from_pretrained(published / "5b")(*given)
    out = model(*given)
    assert out.dtype == torch.bfloat16
    assert relative_error(out.float(), exact) < 0.05


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"latents": (2, 15, 3, 8, 12)}, r"latents have shape \[2, 15, 3, 8, 12\], but .* \[B, 16, T, H, W\]"),
        ({"latents": (2, 16, 0, 8, 12)}, r"latents have shape"),
        ({"latents": (2, 16, 3, 7, 12)}, "height 7, which is no multiple of 2; try 8"),
        ({"latents": (2, 16, 3, 8, 1)}, "width 1, which is no multiple of 2; try 2"),
        ({"text": (2, 7, 19)}, r"text has shape \[2, 7, 19\], but .* \[2, L, 20\]"),
        ({"text": (1, 7, 20)}, r"text has shape \[1, 7, 20\]"),
        ({"timestep": (1,)}, r"timestep has shape \[1\], but these latents take \[2\]"),
    ],
)
def test_wrong_shapes_are_named(published, changed, message):
    shapes = {"latents": (2, 16, 3, 8, 12), "text": (2, 7, 20), "timestep": (2,)} | changed
    model = ExpertTransformer.from_pretrained(published / "2b")
    with pytest.raises(ValueError, match=message):
        model(*(torch.zeros(shapes[name]) for name in ("latents", "text", "timestep")))
