"""Equality of plain values. One of them comes from a jail, in the encoding of `jailed_tests.encode`.

Values from a jail are never put into a set or a dictionary: a program can choose integers with equal hashes, which
makes every look-up linear. Members and keys are compared by a text of their value instead.
"""

import json
import math
from typing import Any

from openmimo.runtime.sandbox.jailed_tests import encode

RELATIVE, ABSOLUTE = 1e-6, 1e-9


def equal(value: Any, expected: Any, relative: float = RELATIVE, absolute: float = ABSOLUTE) -> bool:
    """Return whether two plain values are equal as in Python, except for tuples and floats.

    Tuples equal lists. Two floats are equal within the tolerance of `math.isclose`, unless they are members of sets or
    keys. An integer equals a float only if their values are equal: 4 equals 4.0, and no float near it.

    Raises:
        TypeError: A value is not plain data.
    """
    return matches(encode(value), encode(expected), relative, absolute)


def matches(coded: Any, expected: Any, relative: float = RELATIVE, absolute: float = ABSOLUTE) -> bool:
    """Compare two encoded values as `equal` does. The first may be any JSON value.

    Raises:
        ValueError, TypeError, AttributeError, RecursionError: The first value is not an encoding.
    """
    kind, content = _kind(coded)
    expected_kind, expected_content = _kind(expected)
    if kind != expected_kind:
        return False
    if kind in ("sequence", "set", "dict") and len(content) != len(expected_content):
        return False
    if kind == "sequence":
        return all(
            matches(one, other, relative, absolute) for one, other in zip(content, expected_content, strict=True)
        )
    if kind == "set":
        return sorted(map(_text, content)) == sorted(map(_text, expected_content))
    if kind == "dict":
        items, expected_items = (
            sorted(((_text(key), item) for key, item in pairs), key=_key) for pairs in (content, expected_content)
        )
        return all(
            key == other_key and matches(item, other, relative, absolute)
            for (key, item), (other_key, other) in zip(items, expected_items, strict=True)
        )
    if kind == "number" and isinstance(content, float) and isinstance(expected_content, float):
        both_nan = math.isnan(content) and math.isnan(expected_content)
        return both_nan or math.isclose(content, expected_content, rel_tol=relative, abs_tol=absolute)
    return content == expected_content


def _key(pair: tuple[str, Any]) -> str:
    return pair[0]


def _kind(coded: Any) -> tuple[str, Any]:
    """Return the kind of an encoded value, and its number, text, bytes or list of encoded members."""
    if coded is None:
        return "none", None
    if isinstance(coded, (bool, int, float)):
        return "number", coded
    if isinstance(coded, str):
        return "text", coded
    if isinstance(coded, list):
        return "sequence", coded
    ((kind, content),) = coded.items()
    if kind == "int":
        return "number", int(content, 16)
    if kind == "bytes":
        return "bytes", bytes.fromhex(content)
    if kind in ("tuple", "set", "dict") and isinstance(content, list):
        return ("sequence" if kind == "tuple" else kind), content
    raise ValueError(f"unknown kind {kind!r}")


def _text(coded: Any) -> str:
    """Return a text that is the same for two set members or keys if and only if they are equal."""
    kind, content = _kind(coded)
    if kind == "number":
        whole = not isinstance(content, float) or content.is_integer()
        return hex(int(content)) if whole else float(content).hex()
    if kind == "sequence":
        return f"({','.join(map(_text, content))})"
    if kind == "set":
        return f"{{{','.join(sorted(map(_text, content)))}}}"
    if kind == "bytes":
        return f"b{content.hex()}"
    if kind in ("text", "none"):
        return json.dumps(content)
    raise TypeError(f"a {kind} cannot be a set member or a key")
