"""What tests of operators need: random tensors, memory full of NaN, one rule for how accurate is accurate enough."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def devices() -> list[str]:
    """The devices that operators can be tested on here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class Normal:
    """Normal random tensors, the same for the same seed: `normal = Normal(dtype, device, seed); x = normal(2, 3)`."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device, seed: int):
        self.dtype, self.device = dtype, device
        on_meta = torch.device(device).type == "meta"
        self.generator = None if on_meta else torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        return torch.randn(shape, generator=self.generator, dtype=dtype, device=self.device) * std + mean


@contextmanager
def poisoned_memory(fills: bool = True) -> Iterator[None]:
    """Fill every new tensor with NaN (integers: their maximum), so that what a kernel fails to write shows.

    PyTorch does so together with deterministic algorithms, which on a GPU round otherwise; without `fills` those alone.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def noncontiguous(x: Tensor) -> Tensor:
    """The same values with gaps between them in memory."""
    wide = torch.empty((*x.shape, 2), dtype=x.dtype, device=x.device)
    wide[..., 0] = x
    wide[..., 1] = float("nan")
    return wide[..., 0]


def assert_as_accurate(
    x: Tensor,
    eager: Tensor,
    exact: Tensor,
    factor: float = 2.0,
    what: str = "result",
    largest: float | None = None,
) -> None:
    """AssertionError unless x is about as close to the exact result as plain PyTorch in the same dtype.

    max|x - exact| <= factor max|eager - exact| + 2 eps(dtype) max|exact|, with `exact` in float64 and `eager` in the
    dtype of x; gradients take factor 3. An operator with a bar of its own gives `largest` in the place of max|exact|.
    """
    if x.shape != exact.shape or x.dtype != eager.dtype:
        raise AssertionError(f"{what}: got {x.dtype} {list(x.shape)}, expected {eager.dtype} {list(exact.shape)}")
    if exact.numel() == 0:
        return
    error, error_eager = ((y.detach().double() - exact.detach()).abs().max().item() for y in (x, eager))
    largest = exact.detach().abs().max().item() if largest is None else largest
    bound = factor * error_eager + 2 * torch.finfo(x.dtype).eps * largest
    if not error <= bound:  # a NaN fails too
        peer = f"plain PyTorch in {x.dtype}: {error_eager:.3g}"
        raise AssertionError(f"{what}: error {error:.3g} above {bound:.3g} ({peer})")
