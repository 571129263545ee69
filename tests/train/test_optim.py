import pytest
import torch

from cogvx.train import optim
from cogvx.train.optim import Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonal(matrix) @ v.T
    values = inside.diagonal()
    assert ((values > 0.5) & (values < 1.3)).all()
    assert (inside - values.diag()).abs().max() < (0.1 if optim.multiplies_bf16() else 1e-5)


def test_muon_in_bf16_takes_the_steps_of_pytorchs(monkeypatch):
    monkeypatch.setattr(optim, "multiplies_bf16", lambda: True)
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(16, 12)) for _ in range(2))
    optimisers = Muon([ours], lr=0.1), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)
    for gradient in torch.randn(3, 16, 12):
        for weight, optimiser in zip((ours, theirs), optimisers, strict=True):
            weight.grad = gradient.clone()
            optimiser.step()
    assert (ours - 1).norm() > 0.5
    assert (ours - theirs).norm() < 0.05 * (ours - 1).norm()
