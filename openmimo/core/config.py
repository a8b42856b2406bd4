"""Frozen dataclasses to JSON and back, strictly: an unknown or mistyped field is an error that names it."""

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from openmimo.core.errors import ConfigError
from openmimo.core.files import write_text_atomic

Config = TypeVar("Config")


def to_dict(config: Any) -> Any:
    """A dataclass tree as plain dicts, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return config


def from_dict(config_type: type[Config], values: Any, where: str = "config") -> Config:
    """Builds `config_type` from what `to_dict` gave. `where` is the path used in error messages."""
    return _build(config_type, values, where)


def save(config: Any, path: Path) -> None:
    """Writes a dataclass tree as JSON."""
    write_text_atomic(path, json.dumps(to_dict(config), indent=2) + "\n")


def load(config_type: type[Config], path: Path) -> Config:
    """Reads a dataclass tree that `save` wrote."""
    return from_dict(config_type, read_json(path), where=str(path))


def read_json(path: Path) -> Any:
    """Parses a JSON file; a missing or malformed one is a ConfigError that names file and line."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error


def unknown_key_message(key: str, known: typing.Iterable[str], where: str) -> str:
    """The sentence for a key that nobody reads, with the nearest known one."""
    close = difflib.get_close_matches(key, list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{where} has no field {key!r}{hint}"


def _build(expected: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(expected)
    if origin is typing.Annotated:
        return _build(typing.get_args(expected)[0], value, where)
    if origin in (typing.Union, types.UnionType):
        return _build_union(typing.get_args(expected), value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(expected):
            raise ConfigError(
                f"{where} is {value!r}; it must be one of {', '.join(map(repr, typing.get_args(expected)))}."
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, not {type(value).__name__}.")
        item_type = typing.get_args(expected)[0]
        return tuple(_build(item_type, item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be an object, not {type(value).__name__}.")
        item_type = typing.get_args(expected)[1]
        return {key: _build(item_type, item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(expected):
        return _build_dataclass(expected, value, where)
    if expected is Any:
        return value
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ConfigError(f"{where} must be of type {expected.__name__}, not {type(value).__name__} ({value!r}).")
    return value


def _build_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    real = [option for option in options if option is not type(None)]
    for option in real[:-1]:
        try:
            return _build(option, value, where)
        except ConfigError:
            continue
    return _build(real[-1], value, where)


def _build_dataclass(config_type: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be an object, not {type(values).__name__}.")
    hints = typing.get_type_hints(config_type, include_extras=True)
    names = [field.name for field in dataclasses.fields(config_type)]
    for key in values:
        if key not in names:
            raise ConfigError(unknown_key_message(key, names, where) + ".")
    built = {key: _build(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return config_type(**built)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error
