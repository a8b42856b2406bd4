"""Types and bounds of configuration fields, and renamed keys, whose old names remain valid for one version.

@renamed_keys({"peak_lr": "learning_rate", "seed": "run.seed"})
@dataclass(frozen=True)
class Phase:
    steps: PositiveInt
    learning_rate: NonNegativeFloat

    def __post_init__(self) -> None:
        check_fields(self, "phase")
"""

import collections.abc
import contextlib
import dataclasses
import difflib
import functools
import math
import numbers
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from openmimo.core.errors import ConfigError

Config = TypeVar("Config", bound=type)
_KEYS: dict[type, dict[str, str]] = {}
_MAX_SHOWN = 8
_found: ContextVar[dict[str, str] | None] = ContextVar("found", default=None)


def renamed_keys(keys: Mapping[str, str] = MappingProxyType({})) -> Callable[[Config], Config]:
    """Return a class decorator that declares the renamed keys of a dataclass, in files and as keyword arguments.

    Subclasses inherit the keys of files. To inherit the keyword arguments, a subclass is decorated without keys.

    Args:
        keys: The new key by the old one. A dotted new key lies in a nested config: `phase.steps`.
    """

    def declare(config_type: Config) -> Config:
        _KEYS[config_type] = dict(keys)
        original_init: Any = vars(config_type)["__init__"]

        @functools.wraps(original_init)
        def init(self: Any, *arguments: Any, **values: Any) -> None:
            if any(new_key(config_type, key) for key in values):
                with one_warning(f"a call of {config_type.__name__}"):
                    values = with_new_keys(config_type, values, config_type.__name__)
            original_init(self, *arguments, **values)

        type.__setattr__(config_type, "__init__", init)
        return config_type

    return declare


def renamed_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module with renamed names: an import of an old name prints a warning.

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
    """Return the new key (dotted if nested) of a renamed key of a config; None for any other key."""
    return next((_KEYS[base][old] for base in config_type.__mro__ if old in _KEYS.get(base, {})), None)


def with_new_keys(config_type: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the values of a config under their new keys. Records each renamed key for `one_warning`.

    Raises:
        ConfigError: Both an old key and its new one are present.
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
    """Print one warning about all renamed keys that the block reads. The same warning is printed once per process.

    Args:
        where: The source of the keys, such as the path of a file.
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
    """Print a warning on standard error, once for the same arguments.

    Args:
        where: The source of the old names.
        names: Pairs of an old name and its new name.
    """
    shown = ", ".join(f"{old} (now {new})" for old, new in names[:_MAX_SHOWN])
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    print(
        f"warning: {where} has names of the previous version: {shown}{more}. The next version will not read them.",
        file=sys.stderr,
    )


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The allowed range of a number.

    Attributes:
        least: Minimum, inclusive.
        above: Minimum, exclusive.
        most: Maximum, inclusive.
        below: Maximum, exclusive.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def allow(self, value: float) -> bool:
        """Return whether `value` is within the bounds."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)


PositiveInt = Annotated[int, Bounds(least=1)]
NonNegativeInt = Annotated[int, Bounds(least=0)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeFloat = Annotated[float, Bounds(least=0)]
Fraction = Annotated[float, Bounds(least=0, most=1)]
Seed = Annotated[int, Bounds(least=0, below=2**63)]


def check_fields(config: Any, where: str) -> None:
    """Check every field of a dataclass instance against its annotation. Call it in `__post_init__`.

    Converts ints in float fields to float, lists in tuple fields to tuples, and NumPy numbers to Python numbers.

    Args:
        config: The instance; it may be frozen.
        where: Precedes the field's name in the message, such as "phase 'text'".

    Raises:
        ConfigError: A type is wrong, a float is not finite, or a bound does not hold. The message names the field.
    """
    config_type: Any = type(config)
    for name, expected in field_types(config_type).items():
        object.__setattr__(config, name, checked(expected, getattr(config, name), f"{where}.{name}"))


def checked(expected: Any, value: Any, where: str) -> Any:
    """Check `value` against the annotation `expected` and return it, converted. A dict may become a dataclass.

    Raises:
        ConfigError: As for `check_fields`. The message begins with `where`.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Annotated:
        return _within(checked(arguments[0], value, where), arguments[1:], where)
    if origin in (typing.Union, types.UnionType):
        return _checked_union(arguments, value, where)
    if origin is typing.Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise ConfigError(f"{where} is {shortened(value)}; it must be one of {', '.join(map(repr, arguments))}.")
        return value
    if origin in (tuple, list):
        return _checked_items(origin, arguments, value, where)
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, collections.abc.Mapping):
            raise ConfigError(f"{where} must be an object, not {_shown(value)}.")
        return {
            checked(arguments[0], key, f"a key of {where}"): checked(arguments[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    if isinstance(expected, type) and dataclasses.is_dataclass(expected):
        return value if isinstance(value, expected) else _build(expected, value, where)
    return _checked_scalar(expected, value, where)


def unknown_key_message(key: str, known: typing.Iterable[str], where: str) -> str:
    """Return a sentence about an unknown key, with the most similar known key."""
    close = difflib.get_close_matches(key, list(known), n=1) if len(key) < 80 else []
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{where} has no field {shortened(key)}{hint}"


@functools.cache
def field_types(config_type: type) -> dict[str, Any]:
    """Return the annotation of each field of a dataclass, including bounds."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type)}


@functools.cache
def required_fields(config_type: type) -> list[str]:
    """Return the names of the fields without a default."""
    return [
        field.name
        for field in dataclasses.fields(config_type)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def _within(value: Any, metadata: tuple[Any, ...], where: str) -> Any:
    for bounds in metadata:
        if isinstance(bounds, Bounds) and value is not None and not bounds.allow(value):
            raise ConfigError(f"{where} is {shortened(value)}; it must be {bounds}.")
    return value


def _checked_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return the first option that fits. The value's own type is tried first, so 3 stays an int in `float | int`."""
    if value is None and type(None) in options:
        return None
    real = [option for option in options if option is not type(None)]
    real.sort(key=lambda option: option is not type(value))
    for option in real[:-1]:
        try:
            return checked(option, value, where)
        except ConfigError:
            continue
    return checked(real[-1], value, where)


def _checked_items(origin: type, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} must be a list, not {_shown(value)}.")
    if origin is list or arguments[1:] == (Ellipsis,):
        expected = [arguments[0]] * len(value)
    elif len(value) != len(arguments):
        raise ConfigError(f"{where} must have {len(arguments)} entries, not {len(value)}.")
    else:
        expected = list(arguments)
    return origin(
        checked(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(expected, value, strict=True))
    )


def _checked_scalar(expected: type, value: Any, where: str) -> Any:
    if expected is Any:
        return value
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if expected is int and is_number and isinstance(value, numbers.Integral):
        return int(value)
    if expected is float and is_number:
        return _finite(value, where)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ConfigError(f"{where} must be of type {expected.__name__}, not {_shown(value)}.")
    return value


def _finite(value: numbers.Real, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(
            f"{where} is {value if isinstance(value, float) else 'too large'}; it must be a finite number."
        )
    return number


def _build(config_type: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be an object, not {_shown(values)}.")
    hints = field_types(config_type)
    values = with_new_keys(config_type, values, where)
    for key in values:
        if key not in hints:
            raise ConfigError(unknown_key_message(key, hints, where) + ".")
    built = {key: checked(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    missing = [name for name in required_fields(config_type) if name not in built]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(map(repr, missing))}.")
    return config_type(**built)


def shortened(value: Any) -> str:
    """Return the repr of `value`, truncated to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _shown(value: Any) -> str:
    return f"{type(value).__name__} ({shortened(value)})"
