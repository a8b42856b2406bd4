"""The arguments of tool calls in MiMo's chat format: strings as they are, other values as JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

# The possible beginnings of the JSON text of each type.
_OPENINGS = {
    "object": ("{",),
    "array": ("[",),
    "string": ('"',),
    "number": tuple("-0123456789"),
    "integer": tuple("-0123456789"),
    "boolean": ("true", "false"),
    "null": ("null",),
}
_MAX_OPENING = 5
_JSON_BLANKS = " \t\n\r"
_MAX_SCHEMAS = 64


class ArgumentValue:
    """Converts one argument value to JSON text as it arrives. A value that may be other JSON is held back to its end.

    A value that cannot be a string is JSON, or a string if it is not valid JSON. A value that may be a string and other
    types is taken as JSON if it is JSON of a type other than string (`5`, `null`, `[1]`), else as a string.
    """

    def __init__(self, types: Sequence[str] = ()):
        """
        Args:
            types: The allowed JSON types; empty if unknown.
        """
        types = types or tuple(_OPENINGS)
        other = [name for name in types if name != "string"] if "string" in types else tuple(_OPENINGS)
        self._openings = tuple(opening for name in other for opening in _OPENINGS[name])
        self._head = ""
        self._waiting: list[str] = []
        self._is_string = False

    def push(self, text: str) -> str:
        """Append `text` to the value, and return the JSON text that is now final."""
        if self._is_string:
            return quoted(text)[1:-1]
        self._waiting.append(text)
        if len(self._head) < _MAX_OPENING:
            self._head = (self._head + text).lstrip(_JSON_BLANKS)[:_MAX_OPENING]
        if self._may_be_json():
            return ""
        self._is_string = True
        return quoted("".join(self._waiting))[:-1]

    def finish(self) -> str:
        """Return the rest of the JSON text."""
        if self._is_string:
            return '"'
        text = "".join(self._waiting)
        return text.strip(_JSON_BLANKS) if _is_json(text) else quoted(text)

    def cut(self) -> str:
        """Return the rest of an incomplete value, unchanged."""
        return "" if self._is_string else "".join(self._waiting)

    def _may_be_json(self) -> bool:
        head = self._head
        return any(opening.startswith(head) or head.startswith(opening) for opening in self._openings)


def read_arguments(text: str) -> dict[str, Any] | str:
    """Return the arguments of a call: the JSON object in `text`, or `text` itself if it contains none.

    A truncated call has no complete object. Empty text and `null` give an empty object.
    """
    try:
        value = json.loads(text.strip() or "{}", parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    if value is None:
        return {}
    return value if isinstance(value, dict) else text


def quoted(text: str) -> str:
    """Return `text` as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def argument_types(schema: Any, name: str) -> tuple[str, ...]:
    """Return the JSON types that a function's schema allows for one argument; empty if unknown.

    Follows references within the schema and alternatives, up to 64 in total.
    """
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping) or name not in properties:
        return ()
    types: list[str] = []
    waiting = [properties[name]]
    for _ in range(_MAX_SCHEMAS):
        if not waiting:
            break
        part = waiting.pop()
        alternatives = _alternatives(part, schema)
        waiting += alternatives
        types += [] if alternatives else _direct_types(part)
    is_known = not waiting and all(one in _OPENINGS for one in types)
    return tuple(dict.fromkeys(types)) if is_known else ()


def _alternatives(schema: Any, root: Mapping[str, Any]) -> list[Any]:
    """Return the alternatives or the referenced schema; empty if the schema has types itself."""
    if not isinstance(schema, Mapping) or "type" in schema:
        return []
    if isinstance(schema.get("$ref"), str):
        return [_target(root, schema["$ref"])]
    found = (schema.get(key) for key in ("anyOf", "oneOf", "allOf"))
    return next((list(parts) for parts in found if isinstance(parts, list)), [])


def _direct_types(schema: Any) -> list[str]:
    """Return the types in a schema itself; [""] if it has none."""
    if not isinstance(schema, Mapping):
        return [""]
    named = schema.get("type")
    if isinstance(named, str | list):
        return [named] if isinstance(named, str) else [str(one) for one in named]
    if isinstance(schema.get("enum"), list):
        return [_type_of(value) for value in schema["enum"]]
    return [_type_of(schema["const"])] if "const" in schema else [""]


def _target(root: Any, reference: str) -> Any:
    """Return the target of a reference such as `#/$defs/City`; None if it does not exist in this schema."""
    found = root
    for key in reference.removeprefix("#/").split("/"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _type_of(value: Any) -> str:
    if isinstance(value, str):
        return "string"
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "number"
    return "object" if isinstance(value, Mapping) else "array"


def _is_json(text: str) -> bool:
    """Return whether Python's parser accepts `text`, excluding NaN, infinities and excessive nesting."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
