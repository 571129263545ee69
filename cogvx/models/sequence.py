"""Where the transformer's tokens are: all of them here, as long as nothing else takes the place of `WHOLE`.

What does, holds a run of them in each of several processes (`cogvx.parallel.tokens`), and answers to the same three
calls. B batch, A heads, E head width, L text tokens, N tokens in all, n of them here, D width.
"""

from torch import Tensor

from cogvx_kernels import joint_attention

Rope = tuple[Tensor, Tensor] | None  # cosine and sine, [N - L, E] each


class WholeSequence:
    """Every token is here."""

    def own(self, tokens: Tensor, rope: Rope, num_text: int) -> tuple[Tensor, Rope, int]:
        """Of tokens [B, N, D] those that are held here, [B, n, D]; what rotates those of vision; how many are text."""
        return tokens, rope, num_text

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, A, n, E] -> [B, n, A E]
        """Attention of the tokens here over all of them."""
        return joint_attention(q, k, v)

    def whole(self, vision: Tensor) -> Tensor:  # those held here -> [B, N - L, channels of a patch]
        """What was predicted of each vision token, of all of them."""
        return vision


WHOLE = WholeSequence()
