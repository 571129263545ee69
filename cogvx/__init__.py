"""CogVideoX: text in, video out; exact, trainable, on hardware that people own."""

from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .clip import Clip
    from .pipeline import Pipeline

__all__ = ["Clip", "Pipeline", "__version__"]


def __getattr__(name: str):
    # Lazily, so that `cogvx --help` need not import torch.
    if name == "Pipeline":
        from .pipeline import Pipeline

        return Pipeline
    if name == "Clip":
        from .clip import Clip

        return Clip
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
