"""`--algorithm-options.NAME VALUE` on the command line: options of an algorithm, whose names its plug-in defines."""

import json
from typing import Any

from openmimo.core.errors import ConfigError

_PREFIXES = ("--algorithm-options.", "--algorithm_options.")


def algorithm_arguments(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Splits arguments into options `--algorithm-options.NAME VALUE` (or `...NAME=VALUE`) and the others.

    A dot in a name addresses a nested option: `correction.kind`. Values are JSON, or else text.

    Raises:
        ConfigError: An option has no value.
    """
    options: dict[str, Any] = {}
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith(_PREFIXES):
            others.append(argument)
            continue
        name, equals, value = argument[len(_PREFIXES[0]) :].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"{argument} needs a value.")
            value = rest.pop(0)
        *outer, last = name.replace("-", "_").split(".")
        nested = options
        for key in outer:
            nested = nested.setdefault(key, {})
        nested[last] = _parsed(value)
    return options, others


def merged(options: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`options` with the overrides, recursively."""
    result = dict(options)
    for key, value in overrides.items():
        before = result.get(key)
        result[key] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
