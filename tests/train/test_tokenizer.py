import random
import string

import pytest
import sentencepiece
from transformers import AutoTokenizer, T5Tokenizer

from cogvx.data.shapes import ALL_SCENES
from cogvx.train.tokenizer import build_tokenizer

WORDS = sorted({word for scene in ALL_SCENES for word in scene.prompt.split()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    assert build_tokenizer(path, WORDS, 32) == 3 + len(WORDS) + 1 + 94  # specials, words, "▁", printable ASCII
    return path


@pytest.fixture(scope="module", params=[T5Tokenizer, AutoTokenizer])
def tokenizer(request, folder):
    return request.param.from_pretrained(folder)


def test_every_word_of_the_grammar_is_one_piece(tokenizer):
    for scene in ALL_SCENES:
        assert tokenizer.tokenize(scene.prompt) == ["▁" + word for word in scene.prompt.split()]


def test_any_ascii_text_is_spelled_and_read_back(tokenizer):
    rng = random.Random(0)
    texts = ["".join(rng.choices(string.printable, k=rng.randrange(40))) for _ in range(300)]
    for text in [*texts, "a RED circle, moving!", *WORDS[0], string.printable]:
        ids = tokenizer(text, truncation=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(text.split())


def test_ids_and_length_are_the_published_ones(tokenizer, folder):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == 3 + len(WORDS) + 1 + 94
    assert tokenizer.model_max_length == 32


def test_sentencepiece_splits_the_same_way(tokenizer, folder):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    for scene in ALL_SCENES[::29]:
        text = f"{scene.prompt}, Indeed ({scene.colour}-ish)!"
        assert tokenizer(text).input_ids == [*oracle.encode(text), tokenizer.eos_token_id]


@pytest.mark.parametrize("word", ["", "two words", "café"])
def test_a_word_that_cannot_be_spelled_is_named(tmp_path, word):
    with pytest.raises(ValueError, match=f"words holds {word!r}"):
        build_tokenizer(tmp_path, [word], 32)
