"""What every run has besides its loop: weights by name, a count of steps left out, SIGTERM, a check of each step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .options import TrainingError
from .ranks import ALONE, Ranks
from .shards import slice_like

LEAST_SCALE = 2.0**-10  # of a loss in fp16; it begins at 2^16, so that an overflow here is one of gradients near 10^8


class Scaler(torch.amp.GradScaler):
    """The scale of a loss in fp16, halved after each overflow, but not to 0, where every gradient would be one."""

    def may_fall(self) -> bool:
        return self.is_enabled() and self.get_scale() > LEAST_SCALE

    def update(self, new_scale: float | None = None) -> None:
        super().update(new_scale)
        if self.is_enabled() and self.get_scale() < LEAST_SCALE:
            super().update(LEAST_SCALE)


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
            self.parameters[name].copy_(slice_like(self.parameters[name], value))


class Progress:
    """Where a run stands besides its step."""

    def __init__(self, channels: int | None = None, base: str | None = None, alpha: float | None = None):
        self.channels = channels  # that the model takes: a LoRA's weights alone do not tell models of two tasks apart
        self.base = base  # SHA-256 of what a LoRA stands beside
        self.alpha = alpha  # by which a LoRA's matrices count: with another what was learnt would be another
        self.skipped = 0  # steps whose loss or gradient was not finite
        self._losses: list[float] = []  # since the last state

    def add(self, loss: float) -> None:
        self._losses.append(loss)

    def score(self) -> float | None:
        """The mean loss since the state before, by which states are better or worse; None without any."""
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses) if losses else None

    def state_dict(self) -> dict:
        return {"skipped": self.skipped, "channels": self.channels, "base": self.base, "alpha": self.alpha}

    def load_state_dict(self, state: dict) -> None:
        if state.get("channels", self.channels) != self.channels:
            raise ValueError(f"it is of a model with {state['channels']} input channels, this one has {self.channels}")
        if state.get("base", self.base) != self.base:
            raise ValueError("it is of a LoRA for another checkpoint than this run's model")
        if state.get("alpha", self.alpha) != self.alpha:
            raise ValueError(f"it is of a LoRA with alpha {state['alpha']}, this run's lora.alpha is {self.alpha}")
        self.skipped = state["skipped"]


def is_usable(
    non_finite: str,
    step: int,
    loss: float,
    gradient: float,
    progress: Progress,
    scale_may_fall: bool = False,
    whose: str = "the",
) -> bool:
    """Whether the optimiser may step, which takes a loss and a gradient that are finite; other steps are counted.

    scale_may_fall: that of the loss, which may be too large for fp16: a gradient that is not finite is no fault then.
    whose: loss it is, in an error. Raises TrainingError where the optimiser may not step and the run is to stop then.
    """
    infinite = float("inf")
    is_finite = abs(loss) < infinite
    if is_finite and gradient < infinite:
        return True
    if non_finite == "stop" and not (is_finite and scale_may_fall):
        what = f"{whose} gradient's norm is {gradient}" if is_finite else f"{whose} loss is {loss}"
        kept = "no weight was changed" if whose == "the" else "none of its weights was changed"
        raise TrainingError(
            f"step {step + 1}: {what}; {kept}. Try a lower optimiser.lr, or precision=bf16 or fp32, or "
            "leave such steps out with non_finite=skip"
        )
    progress.skipped += 1
    return False


@contextmanager
def stopping(ranks: Ranks = ALONE, device: torch.device | None = None) -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, to any of the processes; it then no longer ends them, so that the step can be saved.

    All processes must ask equally often.
    """
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: ranks.added(float(bool(came)), device) > 0
    finally:
        signal.signal(signal.SIGTERM, before)
