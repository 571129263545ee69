"""Where weights wait changes no bit of a video."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvx import Pipeline
from cogvx.memory.placed import Pinned
from cogvx.memory.plan import Plan, PlanError
from cogvx.models.eight_bits import to_eight_bits
from cogvx.models.lora import load_lora, unload_lora

VISITING = Plan("visiting", "visiting", "visiting", halos_on_host=True)
STREAMED = replace(VISITING, text_encoder="streamed", transformer="streamed")
QUICK = {"num_inference_steps": 2, "num_frames": 17, "seed": 0, "progress": False}


LORA = {f"transformer.transformer_blocks.{i}.{layer}.lora_{letter}.weight": shape
        for i in range(2) for layer, width in (("norm1.linear", 384), ("ff.net.2", 64))
        for letter, shape in (("A", (2, 256 if width == 64 else 32)), ("B", (width, 2)))}  # fmt: skip


def placed(folder, plan: Plan) -> Pipeline:
    pipeline = Pipeline.from_pretrained(folder, device="cpu")
    parts = pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.configs
    return Pipeline(*parts, numerics=pipeline.numerics, plan=plan, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", ["2b", "1.5-5b-i2v"])
def test_resident_visiting_and_streamed_runs_are_equal_bit_by_bit(small_checkpoint, kind):
    folder, given = small_checkpoint(kind), {}
    if kind.endswith("i2v"):
        given["image"] = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    plain = Pipeline.from_pretrained(folder, device="cpu")("a red circle", **QUICK, **given)
    assert plain.frames.std() > 1
    for plan in (Plan(), VISITING, STREAMED):
        pipeline = placed(folder, plan)
        for _ in range(2):  # a second call finds everything where the first one did
            assert np.array_equal(pipeline("a red circle", **QUICK, **given).frames, plain.frames), plan


def test_guidance_one_after_another_is_within_a_level(small_checkpoint):
    folder = small_checkpoint("5b")
    plain = Pipeline.from_pretrained(folder, device="cpu")("a red circle", **QUICK).frames
    found = placed(folder, Plan(sequential_guidance=True))("a red circle", **QUICK).frames
    assert np.abs(found.astype(int) - plain).max() <= 1


def test_pinned_memory_is_asked_for_in_whole_pieces():
    tensors = [
        torch.randn(30, 20), torch.randn(7, 5).T, torch.tensor(2.0), torch.empty(0, 3),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(900).bfloat16(),
        torch.randint(-128, 128, (100, 3), dtype=torch.int8), torch.randn(2000), torch.randn(10),
    ]  # fmt: skip
    pinned = Pinned(piece=4096, pin=False)  # a machine without a GPU pins nothing
    copies = [pinned.copy(tensor) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copy, tensor)
        assert (copy.dtype, copy.stride()) == (tensor.dtype, tensor.stride())
        assert copy.data_ptr() != tensor.data_ptr() or not tensor.numel()
    assert [len(memory) for memory, _ in pinned.pieces] == [4096, 4096, 8192]  # the large one has its own


def test_weights_are_brought_no_oftener_than_they_must(small_checkpoint):
    pipeline = placed(small_checkpoint("5b"), STREAMED)
    model = pipeline.transformer

    def nbytes(modules) -> int:
        return sum(p.nbytes for module in modules for p in module._parameters.values() if p is not None)

    whole = nbytes(model.modules())
    linears = [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm2)]
    blocks = nbytes(m for block in model.transformer_blocks for m in block.modules()) - nbytes(linears)
    pipeline("a red circle", **QUICK)
    moved = sum(w.moved for w in (pipeline.placed.whole["transformer"], *pipeline.placed.modulation))
    streamed = sum(w.moved for w in pipeline.placed.streams["transformer"].weights)
    once = whole - blocks - nbytes(linears)
    assert moved == once + nbytes(linears)
    first = nbytes(model.transformer_blocks[0].modules()) - nbytes(linears[:2])
    assert streamed == 2 * blocks + first  # the one after the last step's is on its way when the work ends


def test_weights_in_eight_bits_are_the_same_wherever_they_wait(small_checkpoint):
    folder = small_checkpoint("2b")
    plain = Pipeline.from_pretrained(folder, device="cpu")("a red circle", **QUICK).frames
    whole = Pipeline.from_pretrained(folder, device="cpu", weights="int8")
    found = whole("a red circle", **QUICK)
    assert not np.array_equal(found.frames, plain) and found.metadata["plan"]["weights"] == "int8"
    streamed = placed(folder, replace(STREAMED, weights="int8"))
    assert np.array_equal(streamed("a red circle", **QUICK).frames, found.frames)
    with pytest.raises(PlanError, match="weights is 'fp8', those of the plan in memory are None; give one"):
        Pipeline.from_pretrained(folder, device="cpu", weights="fp8", memory=STREAMED)


def test_loras_come_and_go_with_the_weights_beside_them(small_checkpoint, tmp_path):
    folder, file, generator = small_checkpoint("5b"), tmp_path / "x.safetensors", torch.Generator().manual_seed(0)
    save_file({name: torch.randn(shape, generator=generator) for name, shape in LORA.items()}, file)
    plain = Pipeline.from_pretrained(folder, device="cpu", loras=[(file, 0.5)])
    expected = plain("a red circle", **QUICK).frames
    unload_lora(plain.transformer)
    without = plain("a red circle", **QUICK).frames
    assert not np.array_equal(expected, without)
    pipeline = placed(folder, STREAMED)
    for _ in range(2):  # loaded into what has run before, and run again
        load_lora(pipeline.transformer, file, 0.5)
        assert np.array_equal(pipeline("a red circle", **QUICK).frames, expected)
        moved = {name for weights in pipeline.placed.streams["transformer"].weights for _, name, _ in weights.owners}
        assert {"down_x", "up_x"} <= moved
        unload_lora(pipeline.transformer)
        assert np.array_equal(pipeline("a red circle", **QUICK).frames, without)


def test_a_lora_is_given_together_with_weights_in_8_bits(small_checkpoint, tmp_path):
    folder, file, generator = small_checkpoint("5b"), tmp_path / "x.safetensors", torch.Generator().manual_seed(0)
    save_file({name: torch.randn(shape, generator=generator) for name, shape in LORA.items()}, file)
    after = Pipeline.from_pretrained(folder, device="cpu", weights="int8")
    without = after("a red circle", **QUICK).frames
    load_lora(after.transformer, file, 0.5)
    expected = after("a red circle", **QUICK).frames
    given = Pipeline.from_pretrained(folder, device="cpu", weights="int8", loras=[(file, 0.5)])
    assert np.array_equal(given("a red circle", **QUICK).frames, expected) and not np.array_equal(expected, without)
    plain = Pipeline.from_pretrained(folder, device="cpu", loras=[(file, 0.5)]).transformer
    with pytest.raises(ValueError, match=r"a LoRA is loaded beside transformer_blocks.*; load it after"):
        to_eight_bits(plain, "int8")


def test_a_plan_changes_no_dtype(small_checkpoint, tmp_path):
    folder = shutil.copytree(small_checkpoint("5b"), tmp_path / "x")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    for memory in (None, Plan()):
        pipeline = Pipeline.from_pretrained(folder, device="cpu", memory=memory)
        dtypes = [next(part.parameters()).dtype for part in (pipeline.transformer, pipeline.vae)]
        assert dtypes == [torch.float32, torch.bfloat16], memory


def test_places_that_there_are_not():
    with pytest.raises(PlanError, match="weights is 'int4'; valid: None, 'int8', 'fp8'"):
        Plan(weights="int4")
    with pytest.raises(PlanError, match="transformer of a plan is 'disk'; valid: 'resident', 'visiting', 'streamed'"):
        Plan(transformer="disk")
    with pytest.raises(PlanError, match="vae of a plan is 'streamed'; valid: 'resident', 'visiting'"):
        Plan(vae="streamed")
