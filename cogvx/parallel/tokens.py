"""A transformer whose tokens are split over processes: every layer sees its own, attention alone sees all.

Processes stand in a table of T rows, "tokens", and H columns, "heads"; each holds a run of the sequence, text first,
row by row. For attention the processes of a row trade tokens for heads, so that each has all tokens of the row for its
share of the heads; then keys and values go round the processes of a column, and what attention finds in each block of
keys is merged by its weight. Neither H must divide the heads, nor T H the tokens.

B batch, A heads, E head width, N tokens in all, n here, D width.

Source: trading heads "DeepSpeed Ulysses" (arXiv 2309.14509), blocks of keys in a ring "Ring Attention" (arXiv
2310.01889), both in one table "USP" (arXiv 2405.07719).
"""

from functools import partial

import torch
from torch import Tensor

from cogvx_kernels import joint_attention

from ..models.fp16 import widened
from ..models.sequence import Rope, WholeSequence
from ..models.transformer import ExpertBlock, ExpertTransformer
from .links import Link
from .split import Layout, length, lengths


class SplitSequence(WholeSequence):
    """The tokens of this process; row: the processes that trade heads, column: those that hand keys round."""

    def __init__(self, row: Link, column: Link):
        self.row, self.column = row, column
        self.layout = Layout(0, 0, row.size, column.size)  # of the sequence that was seen last

    def share(self, transformer: ExpertTransformer) -> None:
        """Have a transformer compute with the tokens of this process."""
        transformer.share(self)
        for block in transformer.transformer_blocks:
            block.attend = partial(attend_as_one, block)

    def own(self, tokens: Tensor, rope: Rope, num_text: int) -> tuple[Tensor, Rope, int]:
        self.layout = layout = Layout(tokens.shape[1], num_text, self.row.size, self.column.size)
        process = self.column.rank * self.row.size + self.row.rank
        if rope is not None:
            rope = tuple(table[layout.vision(process)] for table in rope)
        # A copy, so that the memory of all tokens is free again.
        return tokens[:, layout.spans[process]].clone(), rope, length(layout.text(process))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, A, n, E] -> [B, n, A E]
        here, heads = self.layout.tokens_in(self.column.rank), lengths(q.shape[1], self.row.size)
        width = q.shape[3]
        q, k, v = (self.trade(x, here, heads) for x in (q, k, v))
        y = self.attend_round(q, k, v)
        return self.trade_back(y, here, [count * width for count in heads])

    def whole(self, vision: Tensor) -> Tensor:
        row = self.row.gathered("patches", vision, self.layout.vision_in(self.column.rank), dim=1)
        return self.column.gathered("patches", row, self.layout.vision_of_rows, dim=1)

    def trade(self, x: Tensor, tokens: list[int], heads: list[int]) -> Tensor:  # [B, A, n, E]
        """All heads of own tokens for own heads of all tokens of the row."""
        if self.row.size == 1:
            return x
        mine, (batch, _, _, width) = heads[self.row.rank], x.shape
        shapes = [(batch, mine, count, width) for count in tokens]
        return torch.cat(self.row.exchange("heads", x.split(heads, dim=1), shapes), dim=2)

    def trade_back(self, y: Tensor, tokens: list[int], widths: list[int]) -> Tensor:
        """[B, tokens of the row, own heads' width] -> [B, n, A E]"""
        if self.row.size == 1:
            return y
        mine = tokens[self.row.rank]
        shapes = [(len(y), mine, width) for width in widths]
        return torch.cat(self.row.exchange("heads", y.split(tokens, dim=1), shapes), dim=2)

    def attend_round(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the keys of every process of the column, block after block."""
        if self.column.size == 1:
            return joint_attention(q, k, v)
        batch, heads, _, width = q.shape
        shapes, y, lse = [(2, batch, heads, count, width) for count in self.layout.tokens_of_rows], None, None
        for kv in self.column.handed_round("keys", torch.stack([k, v]), shapes):
            part, weight = attention_over(q, *kv)
            y, lse = (part.to(weight.dtype), weight) if y is None else merged(y, lse, part, weight)
        return y.to(q.dtype)


def attend_as_one(block: ExpertBlock, y: Tensor, rope: Rope, num_text: int) -> Tensor:
    """A block's attention in the dtype of y, where the block alone would try fp16 first and look at the result.

    Processes that see different tokens would not find the same, and those that repeat it would wait for the others.
    """
    return widened(block.attn1, y.dtype)(y, rope, num_text)


def attention_over(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # [B, n, A E], [B, A, n]
    """Attention of n queries over M keys, and the logarithm of its weight; the operator takes as many as there are."""
    queries, keys = q.shape[2], k.shape[2]
    if queries < keys:
        filler = q[:, :, -1:].expand(-1, -1, keys - queries, -1)
        y, lse = joint_attention(torch.cat([q, filler], dim=2), k, v, return_lse=True)
        return y[:, :queries], lse[:, :, :queries]
    y, lse = joint_attention(q[:, :, :keys].contiguous(), k, v, return_lse=True)
    if queries == keys:
        return y, lse
    # A few queries more than keys, as an uneven split leaves them: too few for an operator of their own.
    wide = lse.dtype
    scores = q[:, :, keys:].to(wide) @ k.to(wide).mT * q.shape[3] ** -0.5
    rest = (scores.softmax(-1) @ v.to(wide)).transpose(1, 2).flatten(2)
    return torch.cat([y, rest.to(y.dtype)], dim=1), torch.cat([lse, scores.logsumexp(-1)], dim=2)


def merged(y: Tensor, lse: Tensor, part: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: y [B, n, A E], with logarithms of weights [B, A, n]."""
    both = torch.logaddexp(lse, weight)
    shares = ((one - both).exp().transpose(1, 2)[..., None] for one in (lse, weight))
    heads = lse.shape[1]
    sides = (x.to(lse.dtype).unflatten(2, (heads, -1)) * share for x, share in zip((y, part), shares, strict=True))
    return sum(sides).flatten(2), both
