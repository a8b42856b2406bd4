"""JSON read strictly (UTF-8, no NaN, no half characters), and counted before and after it is read."""

from collections.abc import Iterator
from typing import Any

import pydantic_core

from openmimo.engine.server import limits


def read_json(content: bytes, most_values: int) -> Any:
    """The value in a JSON text. Raises ValueError for any other text, and for more than `most_values` values."""
    check_counts(content, most_values)
    return pydantic_core.from_json(content, allow_inf_nan=False)


def check_tree(value: Any, most_values: int) -> int:
    """The number of values in parsed JSON. Raises ValueError beyond `most_values`, or beyond `limits.DEPTH` levels."""
    count, depth, level = 0, 0, [value]
    while level:
        count += len(level)
        if count > most_values:
            raise ValueError(f"it holds more than {most_values} values.")
        depth += 1
        if depth > limits.DEPTH:
            raise ValueError(f"it is nested more than {limits.DEPTH} levels deep.")
        level = [inner for outer in level for inner in _inside(outer)]
    return count


def check_counts(content: bytes, most_values: int) -> None:
    """Raises ValueError for too many values, without making any: the parser holds the interpreter while it makes them.

    In valid JSON all values but the first of a list or an object come after a comma, and every second part between
    quotes is outside of strings.
    """
    unescaped = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > 2 * limits.STRINGS:
        raise ValueError(f"it holds more than {limits.STRINGS} strings.")
    outside = b"".join(unescaped.split(b'"')[::2])
    if sum(outside.count(mark) for mark in (b",", b"[", b"{")) > most_values:
        raise ValueError(f"it holds more than {most_values} values.")


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
