"""The files of a published tokenizer folder, without the sentencepiece library.

`spiece.model` is a protobuf message. These are the parts that matter: ModelProto holds pieces (field 1) and a
normaliser (field 3); a piece has a text (1), a score (2) and a kind (3); the normaliser has a map of characters (2).

Source: the sentencepiece project's `sentencepiece_model.proto`.
"""

import base64
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from .saving import write_json

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # the first three pieces of every T5 vocabulary, in this order
SPACE = "▁"
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # kinds of pieces


@dataclass(frozen=True)
class Vocabulary:
    """Pieces of text with their log-probabilities; the ids are their order."""

    pieces: list[tuple[str, float]]
    character_map: bytes = b""  # sentencepiece's compiled normalisation; empty for none

    def to_tokenizer(self, num_sentinels: int = 100) -> Tokenizer:
        """T5's tokenizer over this vocabulary: words split at white space, each behind a "▁", and `</s>` at the end."""
        sentinels = [f"<extra_id_{i}>" for i in reversed(range(num_sentinels))]
        tokenizer = Tokenizer(Unigram([*self.pieces, *((name, 0.0) for name in sentinels)], unk_id=2))
        if self.character_map:
            tokenizer.normalizer = normalizers.Precompiled(self.character_map)
        metaspace = {"replacement": SPACE, "prepend_scheme": "always", "split": True}
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
        )
        tokenizer.decoder = decoders.Metaspace(**metaspace)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["$A", EOS], pair=["$A", EOS, "$B", EOS], special_tokens=[(EOS, 1)]
        )
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in (PAD, EOS, UNK, *sentinels)])
        return tokenizer


def parse_spiece(content: bytes) -> Vocabulary:
    """The vocabulary in a `spiece.model`. Raises ValueError for anything else."""
    pieces: list[tuple[str, float]] = []
    character_map = b""
    for number, value in _fields(content):
        if number == 1:
            parts = dict(_fields(_expect(value, bytes)))
            text = _expect(parts.get(1, b""), bytes).decode("utf-8")  # UnicodeDecodeError is a ValueError
            score = struct.unpack("<f", _expect(parts.get(2, bytes(4)), bytes))[0] if 2 in parts else 0.0
            pieces.append((text, score))
        elif number == 3:
            character_map = _expect(dict(_fields(_expect(value, bytes))).get(2, b""), bytes)
    return Vocabulary(_checked(pieces), character_map)


def _checked(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    if [text for text, _ in pieces[:3]] != [PAD, EOS, UNK]:
        raise ValueError(f"the first pieces are {[text for text, _ in pieces[:3]]}, not {[PAD, EOS, UNK]}")
    wrong = next((text for text, score in pieces if not text or not math.isfinite(score)), None)
    if wrong is not None:
        raise ValueError(f"the piece {wrong!r} is empty or has a score that is no number")
    return pieces


def format_spiece(vocabulary: Vocabulary) -> bytes:
    """The content of a `spiece.model` that sentencepiece and transformers read; a unigram model of T5's layout."""
    kinds = {PAD: CONTROL, EOS: CONTROL, UNK: UNKNOWN}
    model = b"".join(
        _block(1, _block(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kinds.get(text, NORMAL)))
        for text, score in vocabulary.pieces
    )
    trainer = _number(3, 1) + _number(4, len(vocabulary.pieces))  # unigram, size
    trainer += _number(40, 2) + _number(41, 2**64 - 1) + _number(42, 1) + _number(43, 0)  # unk, bos (-1), eos, pad
    trainer += _block(45, UNK.encode()) + _block(47, EOS.encode()) + _block(48, PAD.encode())
    name = b"custom" if vocabulary.character_map else b"identity"
    rules = _number(3, 1) + _number(4, 1) + _number(5, 1)  # prefix a space, drop extra ones, write them as "▁"
    normaliser = _block(1, name) + _block(2, vocabulary.character_map) + rules
    return model + _block(2, trainer) + _block(3, normaliser)


def parse_tokenizer_json(content: dict[str, Any]) -> tuple[Vocabulary, int]:
    """The vocabulary in a T5 `tokenizer.json`, and the number of its sentinels. Raises ValueError for anything else."""
    try:
        if content["model"]["type"] != "Unigram":
            raise ValueError(f"the model is of type {content['model']['type']!r}, not 'Unigram'")
        pieces = [(str(text), float(score)) for text, score in content["model"]["vocab"]]
        rules = content.get("normalizer") or {}
        rules = rules["normalizers"] if rules.get("type") == "Sequence" else [rules]
        maps = [rule["precompiled_charsmap"] for rule in rules if rule.get("type") == "Precompiled"]
        character_map = base64.b64decode(maps[0] or "") if maps else b""
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a part is missing or of another type: {error}") from error
    names = [text for text, _ in pieces]
    num_sentinels = next((i for i, name in enumerate(reversed(names)) if name != f"<extra_id_{i}>"), len(names))
    return Vocabulary(_checked(pieces[: len(pieces) - num_sentinels]), character_map), num_sentinels


def write_tokenizer(folder: Path, vocabulary: Vocabulary, num_sentinels: int, max_length: int) -> None:
    """Write the files of a published tokenizer folder.

    `spiece.model` is for transformers 4 (with sentencepiece), `tokenizer.json` for transformers 5, which would need
    sentencepiece and protobuf for the former.
    """
    (folder / "spiece.model").write_bytes(format_spiece(vocabulary))
    vocabulary.to_tokenizer(num_sentinels).save(str(folder / "tokenizer.json"))
    sentinels = [f"<extra_id_{i}>" for i in range(num_sentinels)]
    names = {"eos_token": EOS, "pad_token": PAD, "unk_token": UNK, "additional_special_tokens": sentinels}
    rules = {"model_max_length": max_length, "extra_ids": num_sentinels, "legacy": True}
    rules["clean_up_tokenization_spaces"] = False
    write_json(folder / "special_tokens_map.json", names)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", **rules, **names})


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of a protobuf message; fixed-width values as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if key & 7 not in (1, 2, 5):
            raise ValueError(f"byte {at} of a message has the unknown wire type {key & 7}")
        size, at = _varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes ends after its message of {len(message)}")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("the file ends inside a number")
        byte, at = message[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"byte {at} ends a number of more than 64 bits")


def _expect(value: bytes | int, kind: type) -> bytes:
    if not isinstance(value, kind):
        raise ValueError(f"a field is of type {type(value).__name__}, not {kind.__name__}")
    return value


def _number(field: int, value: int) -> bytes:
    return _to_varint(field << 3) + _to_varint(value)


def _block(field: int, content: bytes) -> bytes:
    return _to_varint(field << 3 | 2) + _to_varint(len(content)) + content


def _to_varint(value: int) -> bytes:
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])
