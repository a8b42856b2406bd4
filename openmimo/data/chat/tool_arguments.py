"""The arguments of tool calls as MiMo's chat format writes them: strings as they are, any other value as JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

# How the JSON text of each type begins.
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
    """The value of one argument as JSON text. A string flows through; what may be other JSON waits for its end.

    types: the JSON types that it may have; none if nobody knows. A value that must not be a string is JSON, or a string
    if it is none. One that may be a string and something else, or anything, is JSON if it is JSON of another type than
    string (`5`, `null`, `[1]`), else a string.
    """

    def __init__(self, types: Sequence[str] = ()):
        types = types or tuple(_OPENINGS)
        other = [name for name in types if name != "string"] if "string" in types else tuple(_OPENINGS)
        self._openings = tuple(opening for name in other for opening in _OPENINGS[name])
        self._head = ""
        self._waiting: list[str] = []
        self._is_string = False

    def push(self, text: str) -> str:
        """The JSON text that has become certain."""
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
        """The rest of the JSON text."""
        if self._is_string:
            return '"'
        text = "".join(self._waiting)
        return text.strip(_JSON_BLANKS) if _is_json(text) else quoted(text)

    def cut(self) -> str:
        """What is left of a value that never ended, as it is."""
        return "" if self._is_string else "".join(self._waiting)

    def _may_be_json(self) -> bool:
        head = self._head
        return any(opening.startswith(head) or head.startswith(opening) for opening in self._openings)


def read_arguments(text: str) -> dict[str, Any] | str:
    """The arguments of a call in a conversation: the JSON object that the text holds, or the text if it holds none.

    A call that was cut off has no whole object. No text, and `null`, are an empty object.
    """
    try:
        value = json.loads(text.strip() or "{}", parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    if value is None:
        return {}
    return value if isinstance(value, dict) else text


def quoted(text: str) -> str:
    """A text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def argument_types(schema: Any, name: str) -> tuple[str, ...]:
    """The JSON types that a function's schema allows for one argument; none if it does not say.

    It follows references within the schema and alternatives, and gives up on a schema of more than 64 of them.
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
        types += [] if alternatives else _own_types(part)
    is_known = not waiting and all(one in _OPENINGS for one in types)
    return tuple(dict.fromkeys(types)) if is_known else ()


def _alternatives(schema: Any, root: Mapping[str, Any]) -> list[Any]:
    """The schemas that this one stands for; none if it names types itself."""
    if not isinstance(schema, Mapping) or "type" in schema:
        return []
    if isinstance(schema.get("$ref"), str):
        return [_target(root, schema["$ref"])]
    found = (schema.get(key) for key in ("anyOf", "oneOf", "allOf"))
    return next((list(parts) for parts in found if isinstance(parts, list)), [])


def _own_types(schema: Any) -> list[str]:
    """The types that a schema names; [""] if it names none."""
    if not isinstance(schema, Mapping):
        return [""]
    named = schema.get("type")
    if isinstance(named, str | list):
        return [named] if isinstance(named, str) else [str(one) for one in named]
    if isinstance(schema.get("enum"), list):
        return [_type_of(value) for value in schema["enum"]]
    return [_type_of(schema["const"])] if "const" in schema else [""]


def _target(root: Any, reference: str) -> Any:
    """What a reference such as `#/$defs/City` names; None if that is nothing in this schema."""
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
    """Whether Python's parser takes it, but for NaN and infinities. It refuses numbers and nesting without end."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
