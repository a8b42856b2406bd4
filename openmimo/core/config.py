"""Frozen dataclasses to JSON and back, strictly: an unknown or mistyped field is an error that names it."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from openmimo.core.errors import ConfigError
from openmimo.core.fields import checked
from openmimo.core.files import write_text_atomic
from openmimo.core.reading import read_json
from openmimo.core.renamed import one_warning

__all__ = ["from_dict", "load", "read_json", "save", "to_dict"]

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
    """Builds `config_type` from what `to_dict` gave. `where` is the path used in messages.

    Keys of the version before are read under their new names, with one warning.
    """
    with one_warning(where):
        return checked(config_type, values, where)


def save(config: Any, path: Path) -> None:
    """Writes a dataclass tree as JSON."""
    write_text_atomic(path, json.dumps(to_dict(config), indent=2) + "\n")


def load(config_type: type[Config], path: Path) -> Config:
    """Reads a dataclass tree that `save` wrote. Raises ConfigError, which names the file."""
    try:
        return from_dict(config_type, read_json(path), where=str(path))
    except ConfigError as error:
        if str(path) in str(error):
            raise
        raise ConfigError(f"{path}: {error}") from error
