"""What every test run says and takes: the live backends in the header, `--require`."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a Triton kernel is defined, so before any is imported

import cogvx_kernels
from cogvx_kernels._op import OPS, declared_backends


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require", default="", help="backends that must run where they are declared: native,triton")


def pytest_configure(config: pytest.Config) -> None:
    live = cogvx_kernels.explain()
    for backend in required(config):
        if backend not in declared_backends():
            raise pytest.UsageError(f"--require: {backend!r} is none of {', '.join(declared_backends())}")
        reasons = {name: answer[backend] for name, answer in live.items() if answer.get(backend, "live") != "live"}
        if reasons:
            raise pytest.UsageError(f"--require {backend}: does not run: {reasons}")


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
