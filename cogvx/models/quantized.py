"""Weights in fewer bits: fp8 in safetensors, and GGUF. They are computed with in the dtype that they are loaded as."""

import math
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .stored import CheckpointError, Stored, one_line

FP8 = ("F8_E4M3", "F8_E5M2")
DTYPE = torch.bfloat16  # that such files are loaded as, unless another is asked for
# Beside a weight "x.weight", of the two conventions; "x.scale_input" and "x.input_scale" are for fp8 products.
SCALES, UNUSED = ("scale_weight", "weight_scale"), (".scale_input", ".input_scale")
MARK = "scaled_fp8"
# What a GGUF header may count, fields, items of arrays and tensors together; diffusion models have some thousands.
MAX_ITEMS = 2**16
STRING, ARRAY = 8, 9  # kinds of a field's value, beside numbers of so many bytes
BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def is_fp8(stored: Iterable[tuple[str, Stored]]) -> bool:
    return any(tensor.dtype in FP8 for _, tensor in stored)


def unscaled(stored: list[tuple[str, Stored]]) -> list[tuple[str, Stored]]:
    """fp8 tensors as what they stand for, in bf16 or, where they have a scale, in fp32; all others as given."""
    by_name, used = dict(stored), set()
    fp8 = {name: tensor for name, tensor in stored if tensor.dtype in FP8 and not name.endswith(MARK)}
    plain = {}
    for name, tensor in fp8.items():
        stem = name.removesuffix("weight")
        found = [stem + scale for scale in SCALES if name != stem and stem + scale in by_name]
        plain[name] = scaled(tensor, by_name[found[0]]) if found else widened(tensor)
        used.update(found)
    if not fp8:
        return stored
    left = [(name, tensor) for name, tensor in stored if not (name in used or name.endswith((*UNUSED, MARK)))]
    return [(name, plain.get(name, tensor)) for name, tensor in left]


def widened(tensor: Stored) -> Stored:
    return Stored(tensor.shape, "BF16", lambda: tensor.read().to(torch.bfloat16))


def scaled(tensor: Stored, scale: Stored) -> Stored:
    """One scale for all, or one a row."""
    rows = tensor.shape[0] if tensor.shape else 1
    count = math.prod(scale.shape)
    if count not in (1, rows) or len(scale.shape) > 2 or scale.dtype not in ("F32", "BF16", "F16"):
        return Stored(tensor.shape, f"{tensor.dtype} with a scale of {scale.dtype} {scale.shape}", tensor.read)

    def read() -> Tensor:
        factor = scale.read().float().reshape(count, *[1] * (len(tensor.shape) - 1))
        return tensor.read().float() * (factor if count > 1 else factor.reshape(()))

    return Stored(tensor.shape, "F32", read)


@contextmanager
def gguf_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the package checks little: a damaged file can raise anything
        raise CheckpointError(f"{file} is no intact GGUF file: {one_line(error)}") from error


def check_header(file: Path) -> None:
    """Raises CheckpointError for a GGUF file whose header counts more than MAX_ITEMS.

    The package reads arrays item by item: a damaged length would have it read the whole file so.
    """
    with open(file, "rb") as content:
        start = content.read(8)
        order = "<" if start[4:6] != b"\0\0" else ">"  # the version is a small number
        items = 0

        def number(code: str) -> int:
            return struct.unpack(order + code, content.read(struct.calcsize(order + code)))[0]

        def count(more: int) -> int:
            nonlocal items
            items += more
            if items > MAX_ITEMS:
                raise CheckpointError(f"{file} is no intact GGUF file: its header counts more than {MAX_ITEMS} items")
            return more

        def skip(kind: int) -> None:
            if kind == STRING:
                content.seek(number("Q"), 1)
            elif kind == ARRAY:
                of, length = number("I"), count(number("Q"))
                if of in BYTES:
                    content.seek(BYTES[of] * length, 1)
                else:
                    for _ in range(length):
                        skip(of)
            else:
                content.seek(BYTES[kind], 1)

        tensors, fields = number("Q"), number("Q")
        count(tensors)
        for _ in range(count(fields)):
            skip(STRING)  # its name
            skip(number("I"))


def opened_gguf(file: Path) -> list[tuple[str, Stored]]:
    """The tensors in a GGUF file, in fp32 where they are quantised. Raises CheckpointError without the gguf package."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"{file} is a GGUF file; the package gguf reads those: pip install gguf") from error
    with gguf_errors(file):
        check_header(file)
        reader = gguf.GGUFReader(file)
        return [(tensor.name, _of_gguf(gguf, file, reader, tensor)) for tensor in reader.tensors]


def _of_gguf(gguf: Any, file: Path, reader: Any, tensor: Any) -> Stored:
    kind, kinds = tensor.tensor_type, gguf.GGMLQuantizationType
    # Some writers store a tensor in rows of 256, so that it can be quantised, and keep its shape in a field.
    field = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
    shape = [int(size) for size in (reversed(tensor.shape.tolist()) if field is None else field.contents())]
    if math.prod(shape) != int(tensor.n_elements):
        raise CheckpointError(f"{file}: {tensor.name} has {tensor.n_elements} numbers, which do not make {shape}")

    def read() -> Tensor:
        with gguf_errors(file):
            if kind == kinds.BF16:
                return torch.from_numpy(tensor.data.copy()).view(torch.bfloat16).reshape(shape)
            values = tensor.data.copy() if kind in (kinds.F16, kinds.F32) else gguf.dequantize(tensor.data, kind)
            return torch.from_numpy(values).reshape(shape)

    exact = {kinds.F16: "F16", kinds.BF16: "BF16", kinds.F32: "F32"}
    integers = (kinds.I8, kinds.I16, kinds.I32, kinds.I64, kinds.F64)
    return Stored(shape, kind.name if kind in integers else exact.get(kind, "F32"), read)
