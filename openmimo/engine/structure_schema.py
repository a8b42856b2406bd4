"""JSON schemas in the keywords that llguidance knows.

llguidance refuses `propertyNames`, `uniqueItems` and formats that it does not know; pydantic emits all of them.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import permutations
from typing import Any

_KEYWORDS_OF_ONE = ("additionalItems", "additionalProperties", "items", "propertyNames")
_KEYWORDS_OF_MANY = ("allOf", "anyOf", "oneOf", "prefixItems")
_KEYWORDS_OF_NAMED = ("$defs", "definitions", "patternProperties", "properties")
_ANNOTATIONS = ("default", "description", "examples", "title")
_MAX_LISTS = 400  # lists of different items that stand for one `uniqueItems`
_MAX_REFERENCES = 16

_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HEX4 = "[0-9a-fA-F]{1,4}"
_LABEL = "[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DATE = (
    "([0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP_YEAR}-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_IPV6 = "|".join(
    [f"({_HEX4}:){{7}}{_HEX4}", f"({_HEX4}:){{1,7}}:", f":(:{_HEX4}){{1,7}}"]
    + [f"({_HEX4}:){{1,{7 - right}}}(:{_HEX4}){{1,{right}}}" for right in range(1, 7)]
)
_CHARACTER = "([A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})"


def _uuid(version: str) -> str:
    digit, variant = (version, "[89abAB]") if version else ("[0-9a-fA-F]", "[0-9a-fA-F]")
    return f"[0-9a-fA-F]{{8}}-[0-9a-fA-F]{{4}}-{digit}[0-9a-fA-F]{{3}}-{variant}[0-9a-fA-F]{{3}}-[0-9a-fA-F]{{12}}"


# The texts of formats, as regular expressions of the whole text. Each is part of what the format allows.
_FORMATS = {
    **{f"uuid{version}": _uuid(version) for version in ("", "1", "3", "4", "5", "6", "7", "8")},
    "date": _DATE,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": "P([0-9]{1,4}W|[0-9]{1,4}D(T[0-9]{1,4}H([0-9]{1,4}M)?)?|T([0-9]{1,4}H([0-9]{1,4}M)?|[0-9]{1,4}[MS]))",
    "email": rf"[A-Za-z0-9_+-]{{1,32}}(\.[A-Za-z0-9_+-]{{1,31}})?@({_LABEL}\.){{1,3}}[a-zA-Z]{{2,20}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,2}}",
    "ipv4": rf"({_OCTET}\.){{3}}{_OCTET}",
    "ipv6": f"({_IPV6})",
    "time": _TIME,
    "uri": rf"https?://{_LABEL}(\.{_LABEL}){{0,3}}(/{_CHARACTER}*)?",
}
# The formats that llguidance knows itself, where they are those of a value.
_KNOWN_FORMATS = frozenset(
    ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri", "uuid")
)


def known_keywords(schema: Any, root: Any) -> Any:
    """The schema without keywords that llguidance refuses, as far as they can be expressed by others.

    `propertyNames` becomes `patternProperties`, and `uniqueItems` the choice of all lists of different items, if there
    are few. Otherwise it is left out. So are formats without a pattern; JSON Schema has them ignored.

    Args:
        schema: A part of the root.
        root: The whole schema, in which references are looked up.
    """
    if not isinstance(schema, dict):
        return schema
    if schema.get("uniqueItems") is True and (lists := unique_lists(schema, root)) is not None:
        return {"anyOf": [_list_of(values) for values in lists]} if lists else False
    known: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _KEYWORDS_OF_ONE:
            known[name] = known_keywords(value, root)
        elif name in _KEYWORDS_OF_MANY and isinstance(value, list):
            known[name] = [known_keywords(one, root) for one in value]
        elif name in _KEYWORDS_OF_NAMED and isinstance(value, dict):
            known[name] = {key: known_keywords(one, root) for key, one in value.items()}
        elif name == "format" and isinstance(value, str) and value not in _KNOWN_FORMATS:
            if value in _FORMATS and "pattern" not in schema:
                known["pattern"] = f"^{_FORMATS[value]}$"
        elif name != "uniqueItems":
            known[name] = value
    if "propertyNames" in known:
        _name_properties(known, root)
    return known


def _name_properties(known: dict[str, Any], root: Any) -> None:
    """Replace `propertyNames`, if the names it allows have a pattern and there are no other properties."""
    pattern = _name_pattern(known["propertyNames"], root)
    if pattern == "":
        del known["propertyNames"]
    elif pattern is not None and not ({"properties", "patternProperties"} & known.keys()):
        del known["propertyNames"]
        known["patternProperties"] = {pattern: known.get("additionalProperties", True)}
        known["additionalProperties"] = False


def _name_pattern(names: Any, root: Any) -> str | None:
    """The regular expression of the names that a `propertyNames` allows.

    Returns "" if it allows every name, and None if it cannot be expressed.
    """
    names = _resolved(names, root)
    if names is True:
        return ""
    if not isinstance(names, dict):
        return None
    constraints = names.keys() - {"type", *_ANNOTATIONS}
    pattern = _FORMATS.get(str(names.get("format")), "")
    if pattern and names.get("minLength", 0) in (0, 1):
        constraints -= {"minLength"}
    if not constraints or constraints == {"format"}:
        return f"^{pattern}$" if pattern else ""
    if constraints == {"pattern"} and isinstance(names["pattern"], str):
        return names["pattern"]
    options = names.get("enum", [names.get("const")])
    if constraints in ({"enum"}, {"const"}) and isinstance(options, list) and all(isinstance(o, str) for o in options):
        return f"^({'|'.join(map(re.escape, options))})$"
    if constraints <= {"minLength", "maxLength"}:
        least, most = names.get("minLength", 0), names.get("maxLength", "")
        if isinstance(least, int) and (most == "" or isinstance(most, int)):
            return f"^[\\s\\S]{{{least},{most}}}$"
    return None


def unique_lists(schema: dict[str, Any], root: Any) -> list[Sequence[Any]] | None:
    """All lists without repeated items that a schema with `uniqueItems` allows; None if they are not few."""
    if schema.get("type") != "array" or schema.keys() - {"type", "items", "minItems", "maxItems", "uniqueItems"} - {
        *_ANNOTATIONS
    }:
        return None
    values = _values(schema.get("items", True), root)
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    if values is None or len(values) > _MAX_LISTS or not isinstance(least, int) or least < 0:
        return None
    lengths = range(least, 1 + (min(most, len(values)) if isinstance(most, int) else len(values)))
    if sum(math.perm(len(values), length) for length in lengths) > _MAX_LISTS:
        return None
    return [chosen for length in lengths for chosen in permutations(values.values(), length)]


def _values(schema: Any, root: Any) -> dict[str, Any] | None:
    """The different values that a schema allows, by their JSON text, if it lists them; None otherwise."""
    schema = _resolved(schema, root)
    parts = schema.get("anyOf") if isinstance(schema, dict) else None
    if not isinstance(parts, list) or schema.keys() - {"anyOf", *_ANNOTATIONS}:
        return _listed_values(schema)
    values: dict[str, Any] = {}
    for part in parts:
        listed = _listed_values(_resolved(part, root))
        if listed is None:
            return None
        values |= listed
    return values


def _listed_values(schema: Any) -> dict[str, Any] | None:
    if not isinstance(schema, dict):
        return None
    constraints = schema.keys() - set(_ANNOTATIONS)
    if constraints == {"type"} and schema["type"] in ("boolean", "null"):
        return _by_text([None] if schema["type"] == "null" else [False, True])
    options = schema.get("enum", [schema.get("const")])
    if constraints - {"type"} not in ({"enum"}, {"const"}) or not isinstance(options, list):
        return None
    kinds = {type(option) for option in options}
    is_typed = "type" not in schema or (schema["type"], kinds) in (("string", {str}), ("integer", {int}))
    return _by_text(options) if is_typed and len(options) <= _MAX_LISTS else None


def _by_text(values: Iterable[Any]) -> dict[str, Any]:
    return {json.dumps(value, sort_keys=True): value for value in values}


def _list_of(values: Sequence[Any]) -> dict[str, Any]:
    items = [{"const": value} for value in values]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items), "maxItems": len(items)}


def _resolved(schema: Any, root: Any) -> Any:
    """The schema that a reference within the root stands for."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        schema = part_at(root, reference)
    return schema


def part_at(root: Any, pointer: str) -> Any:
    """Return the part of a schema at a JSON pointer (`#/a/b`); True, which allows everything, if it does not exist."""
    found = root
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or part not in found:
            return True
        found = found[part]
    return found
