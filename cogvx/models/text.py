"""Prompts to embeddings: the published T5 encoder and its vocabulary.

B prompts, L text tokens, D width of the encoder. Every prompt is padded to L; padding is embedded like any other token
and no mask is used, as the released models were trained.

A published `tokenizer/` folder holds `spiece.model`, and often `added_tokens.json`, `special_tokens_map.json` and
`tokenizer_config.json`, which say nothing that T5 does not fix: `</s>`, `<pad>`, `<unk>` and the 100 sentinels.
transformers 4 reads `spiece.model` with sentencepiece, transformers 5 with sentencepiece and protobuf, both optional
there; or, preferred by version 5, `tokenizer.json`. Here the vocabulary is read from either without those packages.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from .checkpoint import CheckpointError, component_folder, load_weights, read_json, resolve_folder, safe_path
from .eight_bits import refuse_to_save
from .linear import WideLinear
from .saving import new_folder, write_component
from .spiece import Vocabulary, parse_spiece, parse_tokenizer_json, write_tokenizer

logger = logging.getLogger(__name__)

MAX_SIZE, MAX_LAYERS, MAX_VOCABULARY_BYTES = 2**20, 256, 2**24
EMBEDDING = {"encoder.embed_tokens.weight": "shared.weight"}  # one tensor under two names


@dataclass
class TextEncoder:
    """A T5 encoder behind its tokenizer."""

    model: T5EncoderModel
    vocabulary: Vocabulary
    num_sentinels: int
    max_length: int

    def __post_init__(self) -> None:
        self.tokenizer: Tokenizer = self.vocabulary.to_tokenizer(self.num_sentinels)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        max_length: int = 226,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The text encoder of a pipeline's folder (`text_encoder` and `tokenizer` in it).

        Raises:
            CheckpointError: the folder is no checkpoint, or a damaged, incomplete or unsafe one.
        """
        root = resolve_folder(folder)
        part = component_folder(root, "text_encoder")
        vocabulary, num_sentinels = read_vocabulary(component_folder(root, "tokenizer"), root)
        config = read_t5_config(part, root)
        size = len(vocabulary.pieces) + num_sentinels
        if size > config.vocab_size:
            raise CheckpointError(f"{root}: the tokenizer has {size} pieces, the text encoder {config.vocab_size}")
        with torch.device("meta"):
            model = T5EncoderModel(config)
            fp32 = with_wide_layers(model)
        load_weights(model, part, root, dtype, device, EMBEDDING, fp32)
        model.tie_weights()
        return cls(model.eval(), vocabulary, num_sentinels, max_length)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `text_encoder` and `tokenizer` into a new pipeline's folder; ValueError for weights in 8 bits."""
        refuse_to_save(self.model)
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if name not in EMBEDDING}
        config = self.model.config.to_dict() | {"architectures": ["T5EncoderModel"]}
        with new_folder(Path(folder) / "text_encoder") as partial:
            write_component(partial, weights, config, "model")
        with new_folder(Path(folder) / "tokenizer") as partial:
            write_tokenizer(partial, self.vocabulary, self.num_sentinels, self.max_length)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:  # [B, L, D]
        """The embedding of each prompt. A prompt that is too long is cut, with a warning that shows what was lost."""
        return self.model(self.tokenize(prompts).to(self.model.device))[0]

    def tokenize(self, prompts: list[str]) -> Tensor:  # [B, L]
        rows = []
        for prompt in prompts:
            ids = self.tokenizer.encode(prompt).ids
            if len(ids) > self.max_length:
                cut = self.tokenizer.decode(ids[self.max_length - 1 : -1])
                logger.warning("the prompt is longer than %d tokens; this was cut: %r", self.max_length, cut)
                ids = [*ids[: self.max_length - 1], ids[-1]]
            rows.append(ids + [0] * (self.max_length - len(ids)))
        return torch.tensor(rows)


def with_wide_layers(model: T5EncoderModel) -> list[str]:
    """The names of weights whose products overflow in fp16; their layers now compute in fp32 whatever those are in."""
    overflowing = [name for name, module in model.named_modules() if name.endswith(".wo")]
    for name in overflowing:
        layer = model.get_submodule(name)
        model.set_submodule(name, WideLinear(layer.in_features, layer.out_features, layer.bias is not None))
    return [f"{name}.weight" for name in overflowing]


def read_t5_config(folder: Path, root: Path) -> T5Config:
    content = read_json(folder / "config.json", root)
    path = folder / "config.json"
    if content.get("model_type") != "t5":
        raise CheckpointError(f"{path}: model_type is {content.get('model_type')!r}, not 't5'")
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets")
    for key in sizes:
        value, most = content.get(key, 1), MAX_LAYERS if key == "num_layers" else MAX_SIZE
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(f"{path}: {key} is {str(value)[:60]}; it must be a whole number from 1 to {most}")
    form = content.get("feed_forward_proj", "relu")
    if form not in ("relu", "gated-gelu"):
        raise CheckpointError(f"{path}: feed_forward_proj is {str(form)[:60]!r}, not 'relu' or 'gated-gelu'")
    known = {*sizes, "relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj"}
    try:
        return T5Config(**{key: value for key, value in content.items() if key in known})
    except Exception as error:  # the library raises some five unrelated classes
        raise CheckpointError(f"{path}: {str(error).strip().splitlines()[-1][:200]}") from error


def read_vocabulary(folder: Path, root: Path) -> tuple[Vocabulary, int]:
    """The pieces of a tokenizer's folder and the number of sentinels (`<extra_id_0>` ...) behind them."""
    config = read_json(folder / "tokenizer_config.json", root) if (folder / "tokenizer_config.json").is_file() else {}
    num_sentinels = config.get("extra_ids", 100)
    if type(num_sentinels) is not int or not 0 <= num_sentinels <= 1000:
        raise CheckpointError(f"{folder}: extra_ids is {str(num_sentinels)[:60]}; it must be from 0 to 1000")
    path = folder / "spiece.model"
    try:
        if path.is_file():
            if safe_path(path, root).stat().st_size > MAX_VOCABULARY_BYTES:
                raise CheckpointError(f"{path} has more than {MAX_VOCABULARY_BYTES} bytes")
            vocabulary = parse_spiece(path.read_bytes())
        elif (folder / "tokenizer.json").is_file():
            path = folder / "tokenizer.json"
            vocabulary, num_sentinels = parse_tokenizer_json(read_json(path, root))
        else:
            raise CheckpointError(f"{folder} holds no vocabulary: spiece.model is missing")
        vocabulary.to_tokenizer(num_sentinels)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no intact vocabulary: {str(error)[:200]}") from error
    return vocabulary, num_sentinels
