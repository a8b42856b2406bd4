"""Equality of plain values, one of them from a jail and still as `jailed_tests.encode` coded it.

Nothing that a jail sent is ever put into a set or a dictionary: whoever chooses integers of one hash makes each look-up
walk through all of them. Members and keys are compared by a text of their value instead.
"""

import json
import math
from typing import Any

from openmimo.runtime.sandbox.jailed_tests import encode

RELATIVE, ABSOLUTE = 1e-6, 1e-9


def equal(value: Any, expected: Any, relative: float = RELATIVE, absolute: float = ABSOLUTE) -> bool:
    """Python's equality of plain data, but tuples equal lists, and two floats are equal within a tolerance.

    The tolerance (`math.isclose`: relative to the larger number, or absolute) holds where both numbers are floats and
    are no members of sets and no keys. An integer equals a float only of exactly its value: 4 equals 4.0, and nothing
    near it. Raises TypeError for what is not plain data.
    """
    return matches(encode(value), encode(expected), relative, absolute)


def matches(coded: Any, expected: Any, relative: float = RELATIVE, absolute: float = ABSOLUTE) -> bool:
    """`equal` for two coded values. The first may be anything that JSON can hold.

    Raises ValueError, TypeError, AttributeError or RecursionError where it is nothing that `encode` makes.
    """
    kind, content = _kind(coded)
    wanted_kind, wanted = _kind(expected)
    if kind != wanted_kind:
        return False
    if kind in ("sequence", "set", "dict") and len(content) != len(wanted):
        return False
    if kind == "sequence":
        return all(matches(one, other, relative, absolute) for one, other in zip(content, wanted, strict=True))
    if kind == "set":
        return sorted(map(_text, content)) == sorted(map(_text, wanted))
    if kind == "dict":
        mine, theirs = (sorted(((_text(key), item) for key, item in pairs), key=_key) for pairs in (content, wanted))
        return all(
            key == other_key and matches(item, other, relative, absolute)
            for (key, item), (other_key, other) in zip(mine, theirs, strict=True)
        )
    if kind == "number" and isinstance(content, float) and isinstance(wanted, float):
        both_nan = content != content and wanted != wanted
        return both_nan or math.isclose(content, wanted, rel_tol=relative, abs_tol=absolute)
    return content == wanted


def _key(pair: tuple[str, Any]) -> str:
    return pair[0]


def _kind(coded: Any) -> tuple[str, Any]:
    """What sort of value a coded one is, and its number, text, bytes or list of coded members."""
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
    """A text that two members of sets, or keys, share if and only if they are equal."""
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
    raise TypeError(f"a {kind} can be no member and no key")
