"""The transformer against diffusers', on weights that diffusers saved, and by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from cogvx.config import PRESETS, TransformerConfig
from cogvx.models import ExpertTransformer
from cogvx.models.embeddings import Placement
from cogvx.models.patches import patchify, unpatchify

KINDS = ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"]
# Patches in time, latent H, W. Trained are 3, 8, 12.
GRIDS = {
    "trained": (3, 8, 12),
    "fewer frames": (1, 8, 12),
    "more frames": (5, 8, 12),
    "portrait": (3, 12, 8),
    "wide": (2, 6, 20),
    "larger": (2, 20, 30),
    "odd": (3, 10, 14),
    "one patch": (1, 2, 2),
}


def inputs(config: TransformerConfig, grid: tuple[int, int, int], num_text: int = 7):
    generator = torch.Generator().manual_seed(4)
    num_frames = grid[0] * (config.patch_size_t or 1)
    latents = torch.randn(2, config.in_channels, num_frames, *grid[1:], generator=generator)
    text = torch.randn(2, num_text, config.text_embed_dim, generator=generator)
    return latents, text, torch.tensor([999, 37])


def theirs(model: CogVideoXTransformer3DModel, latents, text, timestep):
    """What diffusers' pipelines do, but that their 1.5 fails for grids beyond the trained one, such as portrait ones.

    There the table of positions has sample_height / 2 x sample_width / 2 entries; here as many as the grid needs.
    """
    config, rope, ofs = model.config, None, None
    num_frames, height, width = latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2
    if config.patch_size_t is not None:
        rope = get_3d_rotary_pos_embed(
            config.attention_head_dim, None, (height, width), num_frames // 2, grid_type="slice", max_size=(99, 99)
        )
    elif config.use_rotary_positional_embeddings:
        region = get_resize_crop_region_for_grid((height, width), config.sample_width // 2, config.sample_height // 2)
        rope = get_3d_rotary_pos_embed(config.attention_head_dim, region, (height, width), num_frames)
    if config.ofs_embed_dim is not None:
        ofs = torch.full((1,), 2.0)
    out = model(latents.transpose(1, 2), text, timestep, ofs=ofs, image_rotary_emb=rope, return_dict=False)[0]
    return out.transpose(1, 2)


def put_table(model: CogVideoXTransformer3DModel, grid: tuple[int, int, int]) -> None:
    """Give diffusers' model the learned positions of another grid, interpolated, which it refuses to take by itself.

    For another number of frames it does not refuse, but takes sinusoids in their place, which no such model was
    trained with.
    """
    embed, config = model.patch_embed, model.config
    num_frames, height, width = grid[0], grid[1] // 2, grid[2] // 2
    trained = 3, config.sample_height // 2, config.sample_width // 2
    start, stop = get_resize_crop_region_for_grid((height, width), trained[2], trained[1])
    time = np.arange(num_frames) if num_frames <= 3 else np.linspace(0, 2, num_frames)
    rows = start[0] + np.arange(height) * (stop[0] * (height - 1) / height - start[0]) / max(height - 1, 1)
    columns = start[1] + np.arange(width) * (stop[1] * (width - 1) / width - start[1]) / max(width - 1, 1)
    text, table = embed.pos_embedding[0].split([7, 3 * 4 * 6])
    x = table.unflatten(0, trained).double().numpy()
    for axis, positions in enumerate((time, rows, columns)):
        x = np.apply_along_axis(lambda y, p=positions: np.interp(p, np.arange(len(y)), y), axis, x)
    x = torch.from_numpy(x).float().flatten(0, 2)
    embed.pos_embedding = torch.cat([text, x])[None]
    embed.sample_frames, embed.sample_height, embed.sample_width = 4 * grid[0] - 3, *grid[1:]


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_computes_what_diffusers_computes(published, relative_error, kind, grid):
    ours = ExpertTransformer.from_pretrained(published / kind)
    oracle = CogVideoXTransformer3DModel.from_pretrained(published / kind)
    given = inputs(ours.config, grid)
    if kind == "5b-i2v" and grid != GRIDS["trained"]:
        put_table(oracle, grid)
    assert relative_error(ours(*given), theirs(oracle, *given)) <= 1e-5


@torch.no_grad()
def test_recomputes_the_learned_positions_of_other_lengths_as_diffusers_does(published, relative_error):
    ours = ExpertTransformer.from_pretrained(published / "5b-i2v")
    oracle = CogVideoXTransformer3DModel.from_pretrained(published / "5b-i2v")
    recomputed = Placement("rescaled", "recomputed")
    for grid in (GRIDS["trained"], GRIDS["fewer frames"], GRIDS["more frames"]):
        given = inputs(ours.config, grid)
        assert relative_error(ours(*given, placement=recomputed), theirs(oracle, *given)) <= 1e-5
    with pytest.raises(ValueError, match="resolution"):
        theirs(oracle, *inputs(ours.config, GRIDS["portrait"]))
    with pytest.raises(
        ValueError, match="the grid is 6 x 4 patches; a learned table is recomputed at the trained 4 x 6"
    ):
        ours(*inputs(ours.config, GRIDS["portrait"]), placement=recomputed)


@pytest.mark.parametrize("kind", KINDS)
def test_learns_what_diffusers_learns(published, kind):
    models = (
        ExpertTransformer.from_pretrained(published / kind),
        CogVideoXTransformer3DModel.from_pretrained(published / kind),
    )
    given = inputs(models[0].config, (3, 8, 12))
    expected = dict(models[1].named_parameters())
    if kind == "5b-i2v":  # a buffer there, a parameter in the official training code
        expected["patch_embed.pos_embedding"] = models[1].patch_embed.pos_embedding.requires_grad_()
    for model, run in zip(models, (models[0], lambda *args: theirs(models[1], *args)), strict=True):
        model.requires_grad_().zero_grad()
        run(*given).square().mean().backward()
    largest = max(parameter.grad.norm() for parameter in expected.values())
    assert expected.keys() == dict(models[0].named_parameters()).keys()
    for name, parameter in models[0].named_parameters():
        difference = (parameter.grad - expected[name].grad).norm()
        # Where the gradient is 0 but for rounding (a bias of k), only its size beside the others means anything.
        assert difference <= 1e-4 * expected[name].grad.norm() + 1e-6 * largest, name


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_sliced_positions_count_on_from_the_trained_ones(published, relative_error, kind):
    """The official training code's rule: smaller grids take the first entries of the trained tables."""
    ours = ExpertTransformer.from_pretrained(published / kind)
    oracle = CogVideoXTransformer3DModel.from_pretrained(published / kind)
    config, grid = ours.config, (2, 6, 10)
    latents, text, timestep = inputs(config, grid)
    rope, size = None, 2 * 3 * 5
    if config.use_rotary_positional_embeddings:
        sizes = {"grid_size": (3, 5), "temporal_size": 2, "grid_type": "slice", "max_size": (4, 6)}
        rope = get_3d_rotary_pos_embed(config.attention_head_dim, None, **sizes)
    if kind in ("2b", "5b-i2v"):
        oracle.patch_embed.pos_embedding = oracle.patch_embed.pos_embedding[:, : 7 + size]
        oracle.patch_embed.sample_frames, oracle.patch_embed.sample_height, oracle.patch_embed.sample_width = 5, 6, 10
    wanted = oracle(latents.transpose(1, 2), text, timestep, ofs=torch.full((1,), 2.0), image_rotary_emb=rope)
    out = ours(latents, text, timestep, placement=Placement("sliced", "sliced"))
    assert relative_error(out, wanted.sample.transpose(1, 2)) <= 1e-5
    if kind in ("2b", "5b-i2v"):
        with pytest.raises(ValueError, match="90 patches do not fit the 72 positions"):
            ours(*inputs(config, (3, 10, 12)), placement=Placement("sliced", "sliced"))


@torch.no_grad()
def test_ofs_changes_what_the_models_that_take_one_make(published):
    model = ExpertTransformer.from_pretrained(published / "1.5-5b-i2v")
    given = inputs(model.config, (1, 4, 4))
    assert torch.equal(model(*given), model(*given, ofs=2))
    assert not torch.allclose(model(*given), model(*given, ofs=3.0))
    for bad in (True, "2", float("nan")):
        with pytest.raises(ValueError, match=f"ofs is {bad!r}; it must be a finite number, 2.0 as in training"):
            model(*given, ofs=bad)
    other = ExpertTransformer.from_pretrained(published / "1.5-5b")
    with pytest.raises(ValueError, match=r"ofs is 2\.0, but this model takes none"):
        other(*inputs(other.config, (1, 4, 4)), ofs=2.0)


@torch.no_grad()
def test_shorter_text_takes_the_first_learned_positions(published):
    model = ExpertTransformer.from_pretrained(published / "5b-i2v")
    short, _ = model.positions((3, 4, 6), 5, torch.device("cpu"), Placement("rescaled", "resampled"))
    table = model.patch_embed.pos_embedding[0]
    assert torch.equal(short[0], table[:5]) and torch.equal(short[1], table[7:])
    with pytest.raises(ValueError, match="text has 8 tokens; this model has positions for at most 7"):
        model(*inputs(model.config, (3, 8, 12), num_text=8))


def test_table_rules_need_their_table(published):
    model = ExpertTransformer.from_pretrained(published / "2b")
    with pytest.raises(ValueError, match="table is 'resampled', but this model has no learned table"):
        model(*inputs(model.config, (1, 4, 4)), placement=Placement("rescaled", "resampled"))


@torch.no_grad()
def test_a_patch_in_time_holds_channels_then_frames_then_rows():
    latents = torch.arange(2.0 * 3 * 4 * 4 * 6).reshape(2, 3, 4, 4, 6)
    tokens = patchify(latents, (2, 2, 2))
    assert tokens.shape == (2, 2 * 2 * 3, 3 * 2 * 2 * 2)
    want = [latents[1, c, 2 + t, h, 4 + w] for c in range(3) for t in range(2) for h in range(2) for w in range(2)]
    assert tokens[1, 1 * 6 + 0 * 3 + 2].tolist() == want
    assert torch.equal(unpatchify(tokens, (2, 2, 3), (2, 2, 2)), latents)


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet(published):
    model = ExpertTransformer.from_pretrained(published / "5b")
    latents, text, timestep = inputs(model.config, (3, 8, 12))
    alone = model(latents[1:], text[1:], timestep[1:])
    torch.testing.assert_close(model(latents, text, timestep)[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("2b", 1_693_783_872),
        ("5b", 5_570_283_072),
        ("5b-i2v", 5_570_479_680 + 17_776 * 3072),  # and the learned table
        ("1.5-5b", 5_570_676_352),
        ("1.5-5b-i2v", 5_571_594_880),
    ],
)
def test_presets_have_the_released_tensors(name, count):
    config = PRESETS[name].transformer
    with torch.device("meta"):
        ours, oracle = ExpertTransformer(config), CogVideoXTransformer3DModel.from_config(config.to_dict())
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, oracle)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_model_is_the_identity_inside_and_learns_everywhere(kind):
    torch.manual_seed(0)
    preset = PRESETS[kind].transformer
    changes = {"num_layers": 2, "num_attention_heads": 1, "sample_height": 4, "sample_width": 4, "sample_frames": 5}
    config = replace(preset, **changes, text_embed_dim=24, max_text_seq_length=7)
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
    config = replace(PRESETS["tiny"].transformer, num_layers=1)
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


def test_frames_that_fill_no_patch_are_named(published):
    model = ExpertTransformer.from_pretrained(published / "1.5-5b")
    with pytest.raises(ValueError, match="latents have num_frames 21, which is no multiple of 2; try 22"):
        model(torch.zeros(1, 16, 21, 8, 12), torch.zeros(1, 7, 20), torch.zeros(1))
