"""Noise schedule, samplers, guidance and loss: pure functions over plain tensors."""
