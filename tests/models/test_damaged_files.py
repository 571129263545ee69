"""Files of weights and LoRAs after accidents: they load, or our error says why, and neither takes long."""

import random
import time

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvx.models import CausalVAE, CheckpointError, ExpertTransformer
from cogvx.models.loading import save_single
from cogvx.models.lora import load_lora, unload_lora
from cogvx.models.sat import load_sat, save_sat

CLASSES = {"transformer": ExpertTransformer, "vae": CausalVAE}


def write_gguf(file, weights):
    """Matrices whose rows are whole blocks in Q8_0, all else in fp32, and a field as some converters write it."""
    writer, q8 = gguf.GGUFWriter(file, "cogvideox"), gguf.GGMLQuantizationType.Q8_0
    for name, tensor in weights.items():
        values = tensor.numpy()
        quantised = tensor.dim() == 2 and tensor.shape[1] % 32 == 0
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
        writer.add_tensor(name, gguf.quantize(values, q8) if quantised else values, raw_dtype=q8 if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def files(published, tmp_path, as_sat):
    """A file of each kind, and what loads it."""
    transformer = ExpertTransformer.from_pretrained(published / "5b")
    vae = CausalVAE.from_pretrained(published)
    save_single(transformer, tmp_path / "stated.safetensors", "model.diffusion_model.")
    save_sat(transformer, tmp_path / "transformer.pt")
    save_sat(vae, tmp_path / "vae.pt")
    weights = load_file(published / "vae" / "diffusion_pytorch_model.safetensors")
    fp8 = {f"vae.{n}": t.to(torch.float8_e4m3fn) if t.dim() > 2 else t for n, t in as_sat("vae", weights).items()}
    save_file({name: tensor.contiguous() for name, tensor in fp8.items()}, tmp_path / "fp8.safetensors")
    lora = {}
    for i, width in enumerate((96, 96, 96)):
        stem = f"lora_unet__transformer_blocks_1_attn1_to_{'qkv'[i]}"
        lora |= {f"{stem}.lora_down.weight": torch.ones(2, width), f"{stem}.lora_up.weight": torch.ones(width, 2),
                 f"{stem}.alpha": torch.tensor(1.0)}  # fmt: skip
    save_file(lora, tmp_path / "lora.safetensors", {"lora_adapter_metadata": '{"transformer.lora_alpha": 2}'})
    peft = {f"transformer.{name}.lora_{letter}.weight": torch.ones(shape) for name in ("norm_out.linear", "proj_out")
            for letter, shape in (("A", (2, transformer.get_submodule(name).in_features)),
                                  ("B", (transformer.get_submodule(name).out_features, 2)))}  # fmt: skip
    save_file(peft, tmp_path / "peft.safetensors", {"lora_adapter_metadata": '{"transformer.lora_alpha": 2}'})
    write_gguf(tmp_path / "transformer.gguf", transformer.state_dict())

    def load_and_unload(file):
        name = load_lora(transformer, file)
        unload_lora(transformer, name)

    return {
        tmp_path / "stated.safetensors": ExpertTransformer.from_pretrained,
        tmp_path / "transformer.pt": lambda file: load_sat(CLASSES, file, config=transformer.config),
        tmp_path / "vae.pt": lambda file: load_sat(CLASSES, file, "vae", config=vae.config),
        tmp_path / "fp8.safetensors": lambda file: CausalVAE.from_pretrained(file, config=vae.config),
        tmp_path / "lora.safetensors": load_and_unload,
        tmp_path / "peft.safetensors": load_and_unload,
        tmp_path / "transformer.gguf": lambda file: ExpertTransformer.from_pretrained(file, config=transformer.config),
    }


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_a_spoiled_file_loads_or_raises_our_error(files, spoiled, count):
    rng, refused = random.Random(count), 0
    for case in range(count):
        file = rng.choice(sorted(files))
        content = file.read_bytes()
        file.write_bytes(spoiled(content, file.suffix, rng))
        start = time.process_time()
        try:
            files[file](file)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000
        except BaseException as error:
            raise AssertionError(f"case {case}: {file} spoiled gives {type(error).__name__}: {error}") from error
        assert time.process_time() - start < 2.0, f"case {case}: {file} spoiled takes too long"
        file.write_bytes(content)
    assert refused > count // 4


def test_a_huge_sat_tensor_that_is_not_there_costs_nothing(published, tmp_path):
    config = ExpertTransformer.from_pretrained(published / "5b", device="meta").config
    whole = torch.zeros(1).expand(2**40)  # four tebibytes, of one number
    torch.save({"module": {"model.diffusion_model.transformer.final_layernorm.weight": whole}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"1 of another shape"):
        load_sat(CLASSES, tmp_path / "x.pt", config=config)
