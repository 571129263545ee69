"""A small T5 tokenizer in the published format: known words are one piece, every other ASCII word is spelled."""

from collections.abc import Iterable
from pathlib import Path

from ..models.spiece import EOS, PAD, SPACE, UNK, Vocabulary, write_tokenizer

WORD_SCORE, LETTER_SCORE = -4.0, -8.0  # log-probabilities: any word beats its spelling
PRINTABLE = [chr(code) for code in range(0x21, 0x7F)]


def build_tokenizer(folder: str | Path, words: Iterable[str], max_length: int) -> int:
    """Write a tokenizer folder that knows `words`; returns the size of its vocabulary.

    Raises:
        ValueError: a word is empty, or has white space or a character outside printable ASCII.
    """
    known = sorted(set(words))
    for word in known:
        if not word or not set(word) <= set(PRINTABLE):
            raise ValueError(f"words holds {word!r}; a word is one or more printable ASCII characters without spaces")
    specials = [(PAD, 0.0), (EOS, 0.0), (UNK, 0.0)]
    spellings = [(piece, LETTER_SCORE) for piece in (SPACE, *PRINTABLE)]
    vocabulary = Vocabulary([*specials, *((SPACE + word, WORD_SCORE) for word in known), *spellings])

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, vocabulary, num_sentinels=0, max_length=max_length)
    return len(vocabulary.pieces)
