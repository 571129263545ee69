import random

import pytest

from cogvx.config import PRESETS
from cogvx.data.packing import num_tokens, pack


def test_a_sample_counts_text_and_patches():
    assert num_tokens(PRESETS["2b"].transformer, (13, 60, 90), 226) == 17_776
    assert num_tokens(PRESETS["1.5-5b"].transformer, (22, 96, 170), 226) == 45_106
    assert num_tokens(PRESETS["2b"].transformer, (1, 32, 48), 226) == 226 + 384  # a picture


def test_a_worked_packing():
    assert pack([4, 8, 1, 4, 2, 1], 10) == [[0, 2, 3, 5], [1, 4]]


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_stands_in_one_pack_and_the_packs_are_full(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 1000) for _ in range(300)]
    packs = pack(lengths, 2000)
    assert sorted(i for each in packs for i in each) == list(range(300))
    assert all(sum(lengths[i] for i in each) <= 2000 for each in packs)
    assert sum(lengths) / (2000 * len(packs)) > 0.97
    assert pack(lengths, 2000) == packs


def test_a_sample_that_is_too_long_is_named():
    with pytest.raises(ValueError, match="sample 1 has 11 tokens, and 1 others; they must be 1 to 10, the capacity"):
        pack([3, 11, 12], 10)
    assert pack([], 10) == []
