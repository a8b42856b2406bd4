"""Keys of a config that have another name or place than in the version before; they are read for one more version.

@renamed_keys({"peak_lr": "learning_rate", "seed": "run.seed"})
@dataclass(frozen=True)
class Phase: ...
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, TypeVar

from openmimo.core.errors import ConfigError

Config = TypeVar("Config", bound=type)
_KEYS: dict[type, dict[str, str]] = {}
_MAX_SHOWN = 8
_found: ContextVar[dict[str, str] | None] = ContextVar("found", default=None)


def renamed_keys(keys: Mapping[str, str] = MappingProxyType({})) -> Callable[[Config], Config]:
    """A class decorator that declares the renamed keys of a dataclass, in files and as keyword arguments.

    Subclasses inherit the keys of files. To inherit the keyword arguments, a subclass is decorated without keys.

    Args:
        keys: The new key by the old one. A dotted new key lies in a nested config: `phase.steps`.
    """

    def declare(config_type: Config) -> Config:
        _KEYS[config_type] = dict(keys)
        made: Any = vars(config_type)["__init__"]

        @functools.wraps(made)
        def init(self: Any, *arguments: Any, **values: Any) -> None:
            if any(new_key(config_type, key) for key in values):
                with one_warning(f"a call of {config_type.__name__}"):
                    values = with_new_keys(config_type, values, config_type.__name__)
            made(self, *arguments, **values)

        type.__setattr__(config_type, "__init__", init)
        return config_type

    return declare


def renamed_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module with renamed names: an import of an old name prints a warning.

    Args:
        module: `__name__` of the module.
        names: The new name by the old one.
    """

    def lookup(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_of_renamed(f"an import from {module}", ((name, names[name]),))
        return getattr(sys.modules[module], names[name])

    return lookup


def new_key(config_type: type, old: str) -> str | None:
    """The new key, dotted where it is nested, of a renamed key of a config; None for every other key."""
    return next((_KEYS[base][old] for base in config_type.__mro__ if old in _KEYS.get(base, {})), None)


def with_new_keys(config_type: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of a config under their new keys. Notes each renamed key for `one_warning`.

    Raises:
        ConfigError: An old key is given together with its new one.
    """
    renamed = {key: new_key(config_type, key) for key in values if isinstance(key, str)}
    result = {key: value for key, value in values.items() if renamed.get(key) is None}
    found = _found.get()
    for old, new in renamed.items():
        if new is None:
            continue
        if found is not None:
            found[old] = new
        *parents, name = new.split(".")
        inner = result
        for parent in parents:
            nested = inner.get(parent, {})
            if not isinstance(nested, dict):
                raise ConfigError(f"{where}.{parent} must be an object that has the key {name!r} in place of {old!r}.")
            inner[parent] = dict(nested)
            inner = inner[parent]
        if name in inner:
            raise ConfigError(f"{where} has {old!r} and also {new!r}, its new name; remove {old!r}.")
        inner[name] = values[old]
    return result


@contextlib.contextmanager
def one_warning(where: str) -> Iterator[None]:
    """Prints one warning about all renamed keys that the block reads; the same warning once in a process.

    Args:
        where: What holds the keys, such as the path of a file.
    """
    token = _found.set({})
    try:
        yield
        found = _found.get()
    finally:
        _found.reset(token)
    if found:
        warn_of_renamed(where, tuple(found.items()))


@functools.cache
def warn_of_renamed(where: str, names: tuple[tuple[str, str], ...]) -> None:
    """Prints a warning on standard error, once for the same arguments.

    Args:
        where: What holds the old names.
        names: Pairs of an old name and its new one.
    """
    shown = ", ".join(f"{old} (now {new})" for old, new in names[:_MAX_SHOWN])
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    print(
        f"warning: {where} has names of an earlier version: {shown}{more}. This version reads them; the next does not.",
        file=sys.stderr,
    )
