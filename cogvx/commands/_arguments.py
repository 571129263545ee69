"""What several commands make of their words."""

import torch


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name; None stays None."""
    return None if name is None else getattr(torch, name)
