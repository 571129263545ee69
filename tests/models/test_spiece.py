"""Vocabulary files, against the sentencepiece library."""

import io
import json

import pytest
import sentencepiece

from cogvx.models.spiece import Vocabulary, format_spiece, parse_spiece, parse_tokenizer_json

SENTENCES = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 10
SPECIALS = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
PROMPTS = ["the quick fox", "  five \t dozen\nliquor ", "ﬁve ½ … Å", "", "Über ①"]


@pytest.fixture(scope="module")
def trained() -> bytes:
    """A `spiece.model` as sentencepiece writes it, with T5's ids and its default normalisation."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=39, character_coverage=1.0,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_splits_as_sentencepiece_does(trained, prompt):
    oracle = sentencepiece.SentencePieceProcessor(model_proto=trained)
    vocabulary = parse_spiece(trained)
    assert vocabulary.character_map
    assert vocabulary.to_tokenizer().encode(prompt).ids == [*oracle.encode(prompt), 1]


def test_sentencepiece_reads_what_we_write(trained):
    vocabulary = parse_spiece(trained)
    written = format_spiece(vocabulary)
    assert parse_spiece(written) == vocabulary
    oracle, copy = (sentencepiece.SentencePieceProcessor(model_proto=model) for model in (trained, written))
    for prompt in PROMPTS:
        assert copy.encode(prompt) == oracle.encode(prompt)
    assert (copy.pad_id(), copy.eos_id(), copy.unk_id(), copy.bos_id()) == (0, 1, 2, -1)


def test_a_tokenizer_json_says_the_same(trained):
    vocabulary = parse_spiece(trained)
    for num_sentinels in (0, 100):
        content = json.loads(vocabulary.to_tokenizer(num_sentinels).to_str())
        assert parse_tokenizer_json(content) == (vocabulary, num_sentinels)


def test_sentinels_and_specials_have_their_ids():
    tokenizer = Vocabulary([*SPECIALS, ("▁a", -1.0)]).to_tokenizer(2)
    assert tokenizer.encode("<extra_id_0> a <pad> a<extra_id_1></s>").ids == [5, 3, 0, 3, 4, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the first pieces are"),
        (b"\x0a\xff", "the file ends inside a number"),
        (b"\x0a\x7fabc", "a field of 127 bytes ends after its message of 5"),
        (b"\x0b", "unknown wire type 3"),
        (b"\x80" * 10 + b"\x01", "a number of more than 64 bits"),
        (b"\x08\x01", "a field is of type int, not bytes"),
        (format_spiece(Vocabulary([*SPECIALS, ("x", float("nan"))])), "'x' is empty or has a score that is no number"),
        (format_spiece(Vocabulary([*SPECIALS, ("", 0.0)])), "'' is empty"),
        (format_spiece(Vocabulary([*SPECIALS, ("x", 0.0)])).replace(b"x", b"\xff", 1), "codec can't decode"),
    ],
)
def test_a_damaged_file_is_a_value_error(content, message):
    with pytest.raises(ValueError, match=message):
        parse_spiece(content)
