"""Configs as JSON files, and run folders, which only one process uses at a time and which keep one config.

Reading is strict: an unknown or mistyped field raises an error that names the field.
"""

import contextlib
import dataclasses
import fcntl
import fnmatch
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from openmimo.core.errors import ConfigError
from openmimo.core.fields import checked, one_warning
from openmimo.core.files import naming, read_json, recover_folder, remove_unfinished, write_text_atomic

__all__ = ["from_dict", "load", "read_json", "save", "to_dict"]

Config = TypeVar("Config")


def to_dict(config: Any) -> Any:
    """Convert a dataclass tree to dicts, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return config


def from_dict(config_type: type[Config], values: Any, where: str = "config") -> Config:
    """Build a `config_type` from a result of `to_dict`. `where` precedes field names in messages.

    Keys of the previous version are read under their new names, with one warning.
    """
    with one_warning(where):
        return checked(config_type, values, where)


def save(config: Any, path: Path) -> None:
    """Write a dataclass tree as JSON."""
    write_text_atomic(path, json.dumps(to_dict(config), indent=2) + "\n")


def load(config_type: type[Config], path: Path) -> Config:
    """Read a dataclass tree that `save` wrote. Raises ConfigError, with the file name."""
    try:
        return from_dict(config_type, read_json(path), where=str(path))
    except ConfigError as error:
        if str(path) in str(error):
            raise
        raise ConfigError(f"{path}: {error}") from error


LOCK_FILE = ".lock"


@contextlib.contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Create the folder, and hold its lock during the block. The kernel releases the lock if the process dies.

    Also removes unfinished files of killed processes.

    Raises:
        ConfigError: Another run uses this folder, or it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_FILE, "a+")  # noqa: SIM115 - closed below, which releases the lock
    except OSError as error:
        raise ConfigError(f"run_folder {str(folder)!r} cannot be written: {error.strerror}. Set another.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"another run uses this folder: process {file.read().strip() or 'unknown'} holds {folder}. Wait until "
                "it ends, or set another run_folder."
            ) from error
        except OSError:
            pass  # the file system does not support locks
        with naming(folder / LOCK_FILE):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        recover_folder(folder / "model")
        remove_unfinished(folder)
        yield


def keep_config(
    config: Any, folder: Path, *, free: Sequence[str], traces: Sequence[str], growing: Sequence[str] = ()
) -> None:
    """Save the config of a run as `config.json` in its folder.

    Args:
        config: A dataclass.
        folder: The run's folder.
        free: Dotted names (with wildcards) of the settings that may change between starts.
        traces: Files and folders. At least one of them exists once the run has begun.
        growing: Dotted names of numbers that may rise between starts.

    Raises:
        ConfigError: The folder contains a run with other settings. The message lists old and new values.
    """
    path = folder / "config.json"
    if path.exists() and any((folder / name).exists() for name in traces):
        check_same_run(config, path, free=free, growing=growing)
    save(config, path)


def check_same_run(config: Any, path: Path, *, free: Sequence[str], growing: Sequence[str] = ()) -> None:
    """Raise ConfigError if the config in the file `path` differs from `config` in more than `free` and `growing`."""
    before, now = _flat(to_dict(load(type(config), path))), _flat(to_dict(config))
    changed = [
        f"{name} was {_value_or_absent(before, name)} and is now {_value_or_absent(now, name)}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name, _ABSENT) != now.get(name, _ABSENT)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in free)
        and not (name in growing and name in before and name in now and before[name] < now[name])
    ]
    if changed:
        more = f"; and {len(changed) - _MAX_SHOWN} more" if len(changed) > _MAX_SHOWN else ""
        shown = "; ".join(changed[:_MAX_SHOWN]) + more
        raise ConfigError(
            f"{path.parent} contains a run with other settings: {shown}. Set another run_folder for a new run, or "
            f"repeat the old one with --from {path}."
        )


_ABSENT = object()
_MAX_SHOWN = 8


def _value_or_absent(values: dict[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "absent"


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts and lists by dotted name, such as `stages.0.learning_rate`."""
    if not isinstance(values, dict | list) or not values:
        return {name: values}
    pairs = list(values.items() if isinstance(values, dict) else enumerate(values))
    return {key: leaf for part, item in pairs for key, leaf in _flat(item, f"{name}.{part}".lstrip(".")).items()}
