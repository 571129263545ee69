"""Single files, SAT files and LoRAs after accidents: they load, or our error says why, and neither takes long."""

import random
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvx.models import CausalVAE, CheckpointError, ExpertTransformer
from cogvx.models.loading import save_single
from cogvx.models.lora import load_lora, unload_lora
from cogvx.models.sat import load_sat, save_sat

CLASSES = {"transformer": ExpertTransformer, "vae": CausalVAE}


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

    def load_and_unload(file):
        name = load_lora(transformer, file)
        unload_lora(transformer, name)

    return {
        tmp_path / "stated.safetensors": ExpertTransformer.from_pretrained,
        tmp_path / "transformer.pt": lambda file: load_sat(CLASSES, file, config=transformer.config),
        tmp_path / "vae.pt": lambda file: load_sat(CLASSES, file, "vae", config=vae.config),
        tmp_path / "fp8.safetensors": lambda file: CausalVAE.from_pretrained(file, config=vae.config),
        tmp_path / "lora.safetensors": load_and_unload,
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
