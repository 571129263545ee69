"""What every test run says and takes: the live backends in the header, `--require`."""

import os
import signal
from pathlib import Path

import host_cuda
import interpreter
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a Triton kernel is defined, so before any is imported

import cogvx_kernels
from cogvx_kernels import _extension
from cogvx_kernels._op import OPS, declared_backends


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require", default="", help="backends that must run where they are declared: native,cuda,triton")
    parser.addoption("--calls", type=int, help="how many calls each fuzz makes, in the place of its own count")


def pytest_configure(config: pytest.Config) -> None:
    torch.backends.cudnn.allow_tf32 = False  # plain PyTorch in fp32 is what others are measured by
    # A shell makes what it runs in the background ignore Ctrl-C, and with it every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "cuda" in required(config) and not torch.cuda.is_available():
        run_cuda_on_host(config)
    interpreter.hasten()
    live = cogvx_kernels.explain()
    for backend in required(config):
        if backend not in declared_backends():
            raise pytest.UsageError(f"--require: {backend!r} is none of {', '.join(declared_backends())}")
        reasons = {name: answer[backend] for name, answer in live.items() if answer.get(backend, "live") != "live"}
        if reasons:
            raise pytest.UsageError(f"--require {backend}: does not run: {reasons}")


def run_cuda_on_host(config: pytest.Config) -> None:
    """CUDA kernels run on the host; the environment's HOST_CUDA_TARGET and HOST_CUDA_SEED say how."""
    try:
        path = host_cuda.build(os.environ.get("HOST_CUDA_TARGET", "plain"))
    except RuntimeError as error:
        raise pytest.UsageError(f"--require cuda: {error}") from None
    host_cuda.Machine(path).seed(int(os.environ.get("HOST_CUDA_SEED", "0")))
    here = _extension.cuda_on_host(host_cuda.load(path))
    here.__enter__()
    config.add_cleanup(lambda: here.__exit__(None, None, None))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long tests first: of several processes none then ends long after the others.

    On a GPU last: Triton's are long there since it compiles, and the time may be up before all have run.
    """
    on_gpu = torch.cuda.is_available()
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None and "triton" not in item.name) != on_gpu)


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = []
    for name, answer in cogvx_kernels.explain().items():
        lines.append(f"{name}: " + "; ".join(b if why == "live" else f"no {b} ({why})" for b, why in answer.items()))
    return lines


def required(config: pytest.Config) -> list[str]:
    return [backend for backend in config.getoption("--require").split(",") if backend]


@pytest.fixture
def run_on(request: pytest.FixtureRequest):
    """`run_on(op, backend, *args)`: skip where the backend cannot take these arguments, fail where it is required.

    Required means on the accelerator, where there is one: a Triton kernel need not run on the CPU beside it.
    """

    def check(op: str, backend: str, *args: torch.Tensor) -> None:
        reason = OPS[op].why_not(backend, *args)
        if reason is not None:
            must = backend in required(request.config) and args[0].is_cuda == torch.cuda.is_available()
            (pytest.fail if must else pytest.skip)(f"{op} {backend}: {reason}")

    return check


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """`small_checkpoint("2b")`, or another preset: a pipeline's folder that diffusers saved, every parameter random."""
    from functools import cache

    @cache
    def build(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("small") / kind
        _random_pipeline(kind, folder.parent / "vocabulary").save_pretrained(folder)
        return folder

    return build


def _random_pipeline(kind: str, vocabulary: Path):
    import diffusers
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    from cogvx.config import PRESETS, TransformerConfig, VAEConfig
    from cogvx.train.tokenizer import build_tokenizer

    size = build_tokenizer(vocabulary, ["a", "red", "circle", "moves", "left"], max_length=16)
    text = T5Config(vocab_size=size, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                    feed_forward_proj="gated-gelu")  # fmt: skip
    preset = PRESETS[kind]
    published, takes_image = preset.transformer, preset.transformer.in_channels == 32
    transformer = TransformerConfig(
        num_attention_heads=2, attention_head_dim=32, in_channels=8 if takes_image else 4, out_channels=4,
        num_layers=2, time_embed_dim=32, patch_size_t=published.patch_size_t, patch_bias=published.patch_bias,
        text_embed_dim=24, max_text_seq_length=16, sample_width=8, sample_height=6, sample_frames=17,
        use_rotary_positional_embeddings=published.use_rotary_positional_embeddings,
        use_learned_positional_embeddings=published.use_learned_positional_embeddings,
        ofs_embed_dim=None if published.ofs_embed_dim is None else 32,
    )  # fmt: skip
    vae = VAEConfig(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_height=48,
        sample_width=64, scaling_factor=preset.vae.scaling_factor, invert_scale_latents=preset.vae.invert_scale_latents,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler if kind == "2b" else diffusers.CogVideoXDPMScheduler
    pipeline = diffusers.CogVideoXImageToVideoPipeline if takes_image else diffusers.CogVideoXPipeline
    return pipeline(
        T5Tokenizer.from_pretrained(vocabulary),
        _randomized(T5EncoderModel(text), 0),
        _randomized(diffusers.AutoencoderKLCogVideoX.from_config(vae.to_dict()), 1),
        _randomized(diffusers.CogVideoXTransformer3DModel.from_config(transformer.to_dict()), 2),
        scheduler.from_config(preset.schedule.to_dict()),
    )


@torch.no_grad()
def _randomized(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every weight drawn: matrices that keep the size of what they map, vectors near the usual ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(drawn / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.2 * drawn + (1 if "norm" in name and name.endswith("weight") else 0))
    for name, buffer in model.named_buffers():
        if name == "patch_embed.pos_embedding" and model.config.use_learned_positional_embeddings:
            buffer.normal_(0.0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`run_command("show", file)`: the command line in this process; its status and what it printed, out and err."""
    import sys

    from cogvx.__main__ import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cogvx", *map(str, words)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return run
