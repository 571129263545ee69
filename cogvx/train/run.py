"""What every run has besides its loop: weights by name, a count of steps left out, SIGTERM, a check of each step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .options import TrainingError


class Weights:
    """Parameters by name, as a part of a state."""

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.parameters = parameters

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state.keys() != self.parameters.keys():
            raise ValueError(f"it holds {len(state)} weights by other names than the {len(self.parameters)} that learn")
        for name, value in state.items():
            if value.shape != self.parameters[name].shape:
                raise ValueError(f"{name} is {list(value.shape)}, here {list(self.parameters[name].shape)}")
            self.parameters[name].copy_(value)


class Progress:
    """Where a run stands besides its step."""

    def __init__(self) -> None:
        self.skipped = 0  # steps whose loss or gradient was not finite

    def state_dict(self) -> dict:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        self.skipped = state["skipped"]


def is_usable(
    non_finite: str, step: int, loss: float, gradient: float, progress: Progress, scaled: bool = False
) -> bool:
    """Whether the optimiser may step; with `non_finite` "skip" it may not, and the step is counted.

    scaled: by a scaler, which leaves steps without a finite gradient out itself. Raises TrainingError where the
    optimiser may not step and the run is to stop then.
    """
    infinite = float("inf")
    if abs(loss) < infinite and (gradient < infinite or scaled):
        return True
    if non_finite == "stop":
        what = f"the loss is {loss}" if not abs(loss) < infinite else f"the gradient's norm is {gradient}"
        raise TrainingError(
            f"step {step + 1}: {what}; no weight was changed. Try a lower optimiser.lr, or precision=bf16 or fp32, or "
            "leave such steps out with non_finite=skip"
        )
    progress.skipped += 1
    return False


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come; it then no longer ends the process, so that the step can be finished and saved."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
