"""LoRA: four namings are one thing, diffusers computes and reads the same, and what is taken away leaves no trace."""

import json

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import save_file

from cogvx.models import CheckpointError, ExpertTransformer
from cogvx.models.lora import (
    AdaptedLinear,
    described,
    fuse_lora,
    load_lora,
    save_lora,
    set_lora_weight,
    unfuse_lora,
    unload_lora,
)

RANK, ALPHA = 4, 2.0
ATTENTION = [f"transformer_blocks.{i}.attn1.{part}" for i in range(2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
SAT = {"to_q": ("query_key_value", 0), "to_k": ("query_key_value", 1), "to_v": ("query_key_value", 2),
       "to_out.0": ("dense", 0)}  # fmt: skip


def drawn(width=96, layers=ATTENTION, seed=5, rank=RANK):
    """Down and up matrices of each layer."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(rank, width, generator=generator) / 8, torch.randn(width, rank, generator=generator) / 4)
            for name in layers}  # fmt: skip


def peft(matrices, prefix="transformer.", middle=""):
    """Without an alpha, which is then the rank: the scale is in the second matrix."""
    scale = ALPHA / RANK
    return {f"{prefix}{name}.lora_{letter}{middle}.weight": matrix
            for name, (a, b) in matrices.items() for letter, matrix in (("A", a), ("B", b * scale))}  # fmt: skip


def sat(matrices, prefix="model.diffusion_model."):
    """With the alpha of the official training, 1, which no file holds: the scale is one over the rank."""
    tensors = {}
    for name, (a, b) in matrices.items():
        _, layer, _, part = name.split(".", 3)
        place, i = SAT[part]
        stem = f"{prefix}transformer.layers.{layer}.attention.{place}"
        tensors |= {f"{stem}.matrix_A.{i}": a, f"{stem}.matrix_B.{i}": b * ALPHA}
    return tensors


def kohya(matrices, prefix="lora_unet_"):
    tensors = {}
    for name, (a, b) in matrices.items():
        stem = prefix + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(ALPHA)}
    return tensors


def fun(matrices):
    return kohya(matrices, "lora_unet__")  # the transformer itself is the first, nameless module of a name


NAMINGS = {
    "diffusers": peft,
    "peft": lambda matrices: peft(matrices, "base_model.model."),
    "peft in a pipeline": lambda matrices: peft(matrices, "base_model.model.transformer.", ".default"),
    "plain": lambda matrices: peft(matrices, ""),
    "sat": sat,
    "sat without its prefix": lambda matrices: sat(matrices, ""),
    "kohya": kohya,
    "fun": fun,
}


@pytest.fixture
def transformer(published):
    return ExpertTransformer.from_pretrained(published / "5b")


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 8, 12, generator=generator)
    return latents, torch.randn(1, 7, 20, generator=generator), torch.tensor([500])


@pytest.fixture
def run(transformer, inputs):
    return lambda: transformer(*inputs).detach()


@pytest.fixture
def file(tmp_path):
    def write(tensors, name="x", metadata=None):
        save_file(
            {key: t.clone().contiguous() for key, t in tensors.items()}, tmp_path / f"{name}.safetensors", metadata
        )
        return tmp_path / f"{name}.safetensors"

    return write


def theirs(published, inputs, *files, weights=None):
    """What diffusers computes with LoRA files; it needs peft for that."""
    pytest.importorskip("peft")
    model = CogVideoXTransformer3DModel.from_pretrained(published / "5b").eval()
    pipeline = CogVideoXPipeline(None, None, None, model, None)
    for i, file in enumerate(files):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"l{i}")
    pipeline.set_adapters([f"l{i}" for i in range(len(files))], weights or [1.0] * len(files))
    latents, text, timestep = inputs
    rotary = pipeline._prepare_rotary_positional_embeddings(64, 96, 3, "cpu")
    with torch.no_grad():
        v = model(latents.transpose(1, 2), text, timestep, image_rotary_emb=rotary, return_dict=False)[0]
    return v.transpose(1, 2)


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_gives_what_diffusers_computes(published, transformer, run, inputs, file, relative_error, naming):
    before = run()
    load_lora(transformer, file(NAMINGS[naming](drawn())))
    expected = theirs(published, inputs, file(peft(drawn()), "y"))
    assert relative_error(run(), expected) <= 1e-5 and relative_error(run(), before) > 1e-2


def test_the_header_may_hold_the_alpha(transformer, run, file, relative_error):
    load_lora(transformer, file(peft(drawn())))
    expected = run()
    unload_lora(transformer)
    for content in (
        {"transformer.lora_alpha": ALPHA, "transformer.r": RANK},
        {
            "transformer.lora_alpha": 9,
            "transformer.alpha_pattern": dict.fromkeys(("to_q", "to_k", "to_v", "to_out.0"), 2),
        },
        {"transformer.lora_alpha": 1, "transformer.use_rslora": True},
    ):
        unscaled = {key: t / (ALPHA / RANK) if "lora_B" in key else t for key, t in peft(drawn()).items()}
        name = load_lora(transformer, file(unscaled, "m", {"lora_adapter_metadata": json.dumps(content)}))
        assert relative_error(run(), expected) <= 1e-6
        unload_lora(transformer, name)
    load_lora(transformer, file(unscaled), alpha=ALPHA)
    assert relative_error(run(), expected) <= 1e-6


def test_every_fully_connected_layer_can_have_one(transformer, run, file, relative_error):
    layers = {name: m for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, layer in layers.items():
        for key, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
            tensors[f"transformer.{name}.lora_{key}.weight"] = 0.1 * torch.randn(shape, generator=generator)
    load_lora(transformer, file(tensors))
    beside = run()
    fuse_lora(transformer)
    assert relative_error(run(), beside) <= 1e-5
    state = transformer.state_dict()
    unload_lora(transformer)
    with torch.no_grad():
        for name in layers:
            down, up = (tensors[f"transformer.{name}.lora_{key}.weight"] for key in "AB")
            transformer.get_submodule(name).weight += up @ down
    assert relative_error(run(), beside) <= 1e-5
    assert all(tensor.shape == state[name].shape for name, tensor in transformer.state_dict().items())


def test_several_with_weights(published, transformer, run, inputs, file, relative_error):
    one, two = file(peft(drawn()), "one"), file(peft(drawn(seed=6, layers=ATTENTION[:3], rank=RANK)), "two")
    load_lora(transformer, one, weight=0.7)
    assert load_lora(transformer, two, weight=3.0) == "two"
    set_lora_weight(transformer, "two", -0.4)
    expected = theirs(published, inputs, one, two, weights=[0.7, -0.4])
    assert relative_error(run(), expected) <= 1e-5
    listed = described(transformer)
    assert [(each["name"], each["weight"], len(each["sha256"])) for each in listed] == [
        ("one", 0.7, 64),
        ("two", -0.4, 64),
    ]
    unload_lora(transformer, "one")
    assert relative_error(run(), theirs(published, inputs, two, weights=[-0.4])) <= 1e-5
    set_lora_weight(transformer, "two", 0.0)
    plain = run()
    unload_lora(transformer)
    assert torch.equal(run(), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unloading_and_unfusing_bring_back_every_bit(transformer, run, file, dtype, relative_error):
    transformer.to(dtype)
    names, before = list(transformer.state_dict()), {n: t.clone() for n, t in transformer.state_dict().items()}
    first = run()
    load_lora(transformer, file(sat(drawn())), weight=0.5)
    beside = run()
    assert list(transformer.state_dict()) == names
    fuse_lora(transformer)
    fuse_lora(transformer)
    assert relative_error(run().float(), beside.float()) <= (1e-5 if dtype == torch.float32 else 0.1)
    assert not torch.equal(transformer.state_dict()[f"{ATTENTION[0]}.weight"], before[f"{ATTENTION[0]}.weight"])
    unfuse_lora(transformer)
    assert torch.equal(run(), beside)
    fuse_lora(transformer)
    unload_lora(transformer)
    assert torch.equal(run(), first) and not [m for m in transformer.modules() if isinstance(m, AdaptedLinear)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())


@pytest.mark.parametrize("naming", NAMINGS)
def test_diffusers_loads_what_we_save(published, transformer, run, inputs, file, tmp_path, relative_error, naming):
    name = load_lora(transformer, file(NAMINGS[naming](drawn())), weight=0.3)
    save_lora(transformer, name, tmp_path / "saved.safetensors")
    set_lora_weight(transformer, name, 1.0)
    assert relative_error(run(), theirs(published, inputs, tmp_path / "saved.safetensors")) <= 1e-5
    expected = run()
    unload_lora(transformer)
    load_lora(transformer, tmp_path / "saved.safetensors")
    assert relative_error(run(), expected) <= 1e-6


def test_a_fused_transformer_is_saved_as_it_computes(transformer, run, file, tmp_path):
    load_lora(transformer, file(fun(drawn())))
    fuse_lora(transformer)
    transformer.save_pretrained(tmp_path / "fused")
    again = ExpertTransformer.from_pretrained(tmp_path / "fused")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in transformer.state_dict().items())
    assert "loras" not in (tmp_path / "fused" / "config.json").read_text()


@pytest.mark.parametrize(("tensors", "message"), [
    (peft(drawn(width=64)), "for another model: 8 layers have another size .*to_k is .64, 64., here .96, 96."),
    (peft(drawn(layers=["transformer_blocks.29.attn1.to_q"])), "another model: 1 layers are not in this one"),
    (peft(drawn(layers=["transformer_blocks.0.attn2.to_q"])), "no LoRA of a CogVideoX transformer: 2 of 2 names are"),
    ({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)}, "is no LoRA of a CogVideoX transformer"),
    ({"transformer.proj_out.dora_scale": torch.ones(1)}, "is no LoRA of a CogVideoX transformer"),
    ({"transformer.proj_out.lora_A.weight": torch.ones(2, 96)}, "proj_out has no up matrix"),
    ({"transformer.proj_out.lora_A.weight": torch.ones(2, 96), "transformer.proj_out.lora_B.weight": torch.ones(64, 3)},
     r"proj_out has matrices .2, 96. and .64, 3., which do not fit"),
    (peft(drawn()) | peft(drawn(), "base_model.model."), "16 of 32 names are those of no layer"),
    (kohya(drawn()) | {"lora_unet_proj_out.alpha": torch.ones(2)}, "proj_out has no down matrix"),
], ids=range(9))  # fmt: skip
def test_a_lora_that_does_not_fit_says_why(transformer, file, run, tensors, message):
    before = run()
    with pytest.raises(CheckpointError, match=message):
        load_lora(transformer, file(tensors))
    assert not transformer.loras and torch.equal(run(), before)


def test_a_lora_of_the_official_training_is_converted(published, transformer, run, file, tmp_path, run_command):
    rest = {"model.diffusion_model.transformer.layers.0.attention.query_key_value.original.weight": torch.zeros(3)}
    torch.save({"module": sat(drawn()) | rest, "iteration": 1}, tmp_path / "s.pt")
    status, out, err = run_command("convert", tmp_path / "s.pt", tmp_path / "l.safetensors", "--to", "lora")
    assert status == 0 and [line.split()[-1] for line in out.splitlines()[1:]] == list(rest), err
    load_lora(transformer, file(sat(drawn())))
    expected = run()
    unload_lora(transformer)
    load_lora(transformer, tmp_path / "l.safetensors")
    assert torch.equal(run(), expected)  # one over the rank is a power of two here
    assert run_command("convert", file(kohya(drawn())), tmp_path / "k.safetensors", "--to", "lora")[0] == 0
    assert run_command("convert", published / "5b", tmp_path / "n.safetensors", "--to", "lora")[0] == 2
    status, _, err = run_command("convert", tmp_path / "s.pt", tmp_path / "m", "--to", "diffusers")
    assert status == 2 and "holds no transformer or vae of CogVideoX" in err


def test_the_same_file_twice_has_two_names(transformer, run, file, relative_error):
    file(peft(drawn()), "good")
    names = [load_lora(transformer, file(peft(drawn()), "good"), weight=0.5) for _ in range(2)]
    both = run()
    assert names == ["good", "good_2"] and list(transformer.loras) == names
    unload_lora(transformer, "good")
    set_lora_weight(transformer, "good_2", 1.0)
    assert relative_error(run(), both) <= 1e-5


def test_what_else_is_refused(transformer, file, tmp_path):
    good = file(peft(drawn()), "good")
    for options, message in (
        ({"weight": float("nan")}, "weight is nan; it must be a finite number"),
        ({"alpha": "1"}, "alpha is '1'; it must be a finite number"),
        ({"name": "a.b"}, r"name is 'a\.b'; it must be letters, digits and _ alone, and not in use"),
    ):
        with pytest.raises(ValueError, match=message):
            load_lora(transformer, good, **options)
    for content, message in (("[", "is no valid JSON"), ('{"transformer.use_dora": true}', "is a DoRA")):
        with pytest.raises(CheckpointError, match=message):
            load_lora(transformer, file(peft(drawn()), "bad", {"lora_adapter_metadata": content}))
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is a pickle, .* cogvx convert x\.pt"):
        load_lora(transformer, tmp_path / "x.pt")
    load_lora(transformer, good)
    with pytest.raises(ValueError, match=r"name is 'good'; it must be .* not in use"):
        load_lora(transformer, good, name="good")
    with pytest.raises(ValueError, match="name is 'other'; loaded are good"):
        unload_lora(transformer, "other")
    fuse_lora(transformer)
    for call in (lambda: load_lora(transformer, good, name="b"), lambda: set_lora_weight(transformer, "good", 2)):
        with pytest.raises(ValueError, match="are fused; unfuse them"):
            call()
