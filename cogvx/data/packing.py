"""Which samples share a sequence: as many as fit into a number of tokens, so that no token is padding."""

from collections.abc import Sequence

from ..config import TransformerConfig


def num_tokens(config: TransformerConfig, latent_size: tuple[int, int, int], num_text: int) -> int:
    """Tokens of a sample: of its text, and of the patches of its latents T, H, W."""
    vision = 1
    for size, patch in zip(latent_size, config.patch, strict=True):
        vision *= size // patch
    return num_text + vision


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of samples that share a sequence of at most `capacity` tokens each; every sample stands in one.

    First fit, longest first: never more than 11/9 of the fewest sequences that are possible, and one. The same lengths
    give the same packs; within a pack, and among packs, the order is that of the samples.

    Raises ValueError for a sample that does not fit alone.
    """
    too_long = [i for i, length in enumerate(lengths) if not 0 < length <= capacity]
    if too_long:
        i, more = too_long[0], f", and {len(too_long) - 1} others" if len(too_long) > 1 else ""
        raise ValueError(f"sample {i} has {lengths[i]} tokens{more}; they must be 1 to {capacity}, the capacity")
    packs: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for place, left in enumerate(room):
            if lengths[i] <= left:
                packs[place].append(i)
                room[place] -= lengths[i]
                break
        else:
            packs.append([i])
            room.append(capacity - lengths[i])
    return sorted(sorted(each) for each in packs)
