"""Attention over blocks of keys, merged; several processes are in `test_videos.py`."""

import pytest
import torch

from cogvx.parallel.tokens import attention_over, merged
from cogvx_kernels import joint_attention


@pytest.mark.parametrize("blocks", [(20, 17), (12, 12, 13), (36, 1)], ids=str)
def test_attention_over_blocks_of_keys_is_that_over_all(blocks):
    """Of fewer queries than keys, of as many, and of more."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, sum(blocks), 16, dtype=torch.float64) for _ in range(3))
    whole = joint_attention(q, k, v)
    for start, stop in ((0, blocks[0]), (5, 6), (0, sum(blocks))):
        found = None
        for keys, values in zip(k.split(blocks, dim=2), v.split(blocks, dim=2), strict=True):
            part = attention_over(q[:, :, start:stop], keys, values)
            found = part if found is None else merged(*found, *part)
        assert torch.allclose(found[0], whole[:, start:stop], rtol=0, atol=1e-12)


def test_a_block_that_hardly_counts_leaves_the_others_as_they_are():
    y, lse = torch.ones(1, 2, 8), torch.zeros(1, 4, 2)
    assert torch.equal(merged(y, lse, torch.full_like(y, 1e3), lse - 200)[0], y)
