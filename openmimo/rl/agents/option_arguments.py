"""`--algorithm-options.NAME VALUE` on the command line: options whose names a plug-in defines."""

import json
from typing import Any

from openmimo.core.errors import ConfigError


def plugin_arguments(arguments: list[str], group: str) -> tuple[dict[str, Any], list[str]]:
    """Splits arguments into options `--GROUP.NAME VALUE` (or `--GROUP.NAME=VALUE`) and the others.

    A dot in a name addresses a nested option: `correction.kind`. Values are JSON, or else text.

    Args:
        arguments: The words after the verb.
        group: The prefix of the options, such as "algorithm-options".

    Raises:
        ConfigError: An option has no value.
    """
    prefixes = (f"--{group}.", f"--{group.replace('-', '_')}.")
    options: dict[str, Any] = {}
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith(prefixes):
            others.append(argument)
            continue
        name, equals, value = argument[len(prefixes[0]) :].partition("=")
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
