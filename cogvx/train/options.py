"""A run's options: a dataclass's defaults, then a TOML file, then `a.b=value` words; and back to TOML.

A dataclass may hold others. Fields are of type bool, int, float, str, Path, a Literal, any of these or None, or a tuple
of one of these.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from ..models.on_disk import replacing

Config = TypeVar("Config")


class _Said(NamedTuple):
    """The value of a word as it stands there, and as TOML reads it: `out=7` names a folder, `seed=7` is a number."""

    text: str
    value: Any


class TrainingError(ValueError):
    """Options, data or a machine with which a run cannot go on; the message says what to change."""


def read_options(config_class: type[Config], file: Path | None, words: Sequence[str] = ()) -> Config:
    """The options of a TOML file, changed by words such as `optimiser.lr=1e-4`; what neither names stays as it is.

    Raises TrainingError for a key that is not known, with the nearest one, and for a value of the wrong kind.
    """
    content: dict[str, Any] = {}
    if file is not None:
        try:
            content = tomllib.loads(file.read_text())
        except OSError as error:
            raise TrainingError(f"{file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise TrainingError(f"{file} is no valid TOML: {error}") from error
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise TrainingError(f"{word!r} changes no option; write key=value, such as optimiser.lr=1e-4")
        _put(content, key.split("."), _parsed(text), word)
    return _made(config_class, content, "")


def to_toml(config: Any) -> str:
    """The options as TOML that `read_options` reads; TOML has no None, so that is written as "none"."""
    return "\n".join(_lines(config, "")) + "\n"


def claim(name: str, folder: Path, kind: str, config: Any) -> None:
    """Keep `folder`, the value of the option `name`, for a run of these options, written there as `kind`.toml.

    Raises TrainingError where it holds a run of others.
    """
    file, text = folder / f"{kind}.toml", to_toml(config)
    if file.exists() and file.read_text() != text:
        raise TrainingError(
            f"{name} is {str(folder)!r}, which holds a run of other options ({file.name}); name another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        partial.write_text(text)


def _put(content: dict, path: list[str], value: Any, word: str) -> None:
    for name in path[:-1]:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise TrainingError(f"{word!r}: {name} is a value, not a group of options")
    content[path[-1]] = value


def _parsed(text: str) -> Any:
    """A value as TOML has it; words without quotes are text, or may be where text is wanted."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, str | dict) else _Said(text, value)


def _made(config_class: type[Config], content: dict[str, Any], path: str) -> Config:
    kinds = typing.get_type_hints(config_class)
    known = [field.name for field in dataclasses.fields(config_class) if field.init]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            advice = f"did you mean {path}{near[0]}?" if near else f"valid: {', '.join(known)}"
            raise TrainingError(f"{path}{key} is no option; {advice}")
    given = {key: _value(f"{path}{key}", value, kinds[key]) for key, value in content.items()}
    missing = [f.name for f in dataclasses.fields(config_class) if f.name not in given and _is_required(f)]
    if missing:
        raise TrainingError(f"{path}{missing[0]} is missing; give it in the file or as {path}{missing[0]}=...")
    return config_class(**given)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(name: str, value: Any, kind: Any) -> Any:
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            return None
        return _value(name, value, next(choice for choice in choices if choice is not types.NoneType))
    if isinstance(value, _Said):
        value = value.text if kind in (str, Path) else value.value
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TrainingError(f"{name} is {value!r}; it is a group of options, such as {name}.{_first(kind)}")
        return _made(kind, value, f"{name}.")
    if origin is Literal:
        if value not in choices:
            raise TrainingError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_value(f"{name}[{i}]", each, choices[0]) for i, each in enumerate(value))
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    wanted = "a list" if origin is tuple else {float: "a number", int: "a whole number", bool: "true or false"}.get(
        kind, "text")  # fmt: skip
    raise TrainingError(f"{name} is {value!r}; it must be {wanted}")


def _first(config_class: type) -> str:
    return dataclasses.fields(config_class)[0].name


def _lines(config: Any, path: str) -> list[str]:
    lines, groups = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            groups += ["", f"[{path}{field.name}]", *_lines(value, f"{path}{field.name}.")]
        else:
            lines.append(f"{field.name} = {_text(value)}")
    return lines + groups


def _text(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
