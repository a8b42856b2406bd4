"""Whether a form has a text of finite length at all: recursion that never ends is found before anything runs.

Only what always recurses is sought here: an object that requires itself, a rule whose every alternative needs the rule.
Where a form uses something that is not understood here, it counts as one that has a text.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from openmimo.core.records import Structure

_Has = Callable[[str], bool]


def has_text(structure: Structure) -> bool:
    """Whether some text has the form. structure: one that llguidance compiles."""
    try:
        if structure.kind == "json_schema":
            root = json.loads(structure.source)
            return _least_fixpoint("#", lambda pointer, has: _schema_has_text(_at(root, pointer), has))
        rules = _rules(structure.source) if structure.kind == "grammar" else None
        return rules is None or _least_fixpoint("start", lambda name, has: _rule_has_text(rules, name, has))
    except RecursionError:  # hundreds of parts, each inside the one before
        return True


def _least_fixpoint(root: str, evaluate: Callable[[str, _Has], bool]) -> bool:
    """Whether `root` has a text. evaluate(name, has): whether one thing has, given which of the others have.

    A round evaluates every name once, and a name that is met inside itself counts as one without a text. That can be
    wrong for names on the way, so rounds go on as long as one proves something new.
    """
    proven: set[str] = set()
    num_proven = -1
    while root not in proven and len(proven) > num_proven:
        num_proven = len(proven)
        _evaluate_all(root, evaluate, proven)
    return root in proven


def _evaluate_all(root: str, evaluate: Callable[[str, _Has], bool], proven: set[str]) -> None:
    seen = set(proven)

    def has(name: str) -> bool:
        if name not in seen:
            seen.add(name)
            if evaluate(name, has):
                proven.add(name)
        return name in proven

    has(root)


# --- JSON schemas -----------------------------------------------------------------------------------------------------


def _at(root: Any, pointer: str) -> Any:
    """The part of a schema that a JSON pointer (`#/a/b`) names; True, which allows everything, if there is none."""
    here = root
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(here, dict) or part not in here:
            return True
        here = here[part]
    return here


def _schema_has_text(schema: Any, has: _Has) -> bool:
    if not isinstance(schema, dict):
        return schema is not False

    def each(name: str) -> list[bool]:
        options = schema.get(name)
        return [_schema_has_text(option, has) for option in options] if isinstance(options, list) else [True]

    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#") and not has(reference):
        return False
    if not (any(each("anyOf")) and any(each("oneOf")) and all(each("allOf"))):
        return False
    if schema.get("type") == "object":
        properties, required = schema.get("properties"), schema.get("required")
        if isinstance(properties, dict) and isinstance(required, list):
            return all(_schema_has_text(properties.get(str(name), True), has) for name in required)
    if schema.get("type") == "array":
        count, first = schema.get("minItems", 0), schema.get("prefixItems", [])
        if isinstance(count, int) and isinstance(first, list):
            needed = first[:count] + [schema.get("items", True)] * (count > len(first))
            return all(_schema_has_text(item, has) for item in needed)
    return True


# --- Lark grammars ----------------------------------------------------------------------------------------------------

_LARK = re.compile(
    r"(?P<skip>[ \t]+|//[^\n]*|\#[^\n]*)"
    r"|(?P<line>\r?\n)"
    r'|(?P<text>"(?:\\.|[^"\\\n])*"i?|/(?:\\.|[^/\\\n])+/[a-z]*|<[^>\n]*>)'
    r"|(?P<name>[?!]?[A-Za-z_][\w-]*)"
    r"|(?P<mark>[:|()\[\]?*+])"
    r"|(?P<other>.)"
)
_Token = tuple[str, str]  # kind and text


def _rules(source: str) -> dict[str, list[_Token]] | None:
    """The tokens of each rule's body; None for a grammar with something that is not understood here."""
    tokens = [(match.lastgroup, match.group()) for match in _LARK.finditer(source) if match.lastgroup != "skip"]
    if any(kind == "other" for kind, _ in tokens):
        return None
    rules: dict[str, list[_Token]] = {}
    body: list[_Token] = []
    for index, (kind, text) in enumerate(tokens):
        begins = kind == "name" and (index == 0 or tokens[index - 1][0] == "line")
        if begins and tokens[index + 1 : index + 2] == [("mark", ":")]:
            body = rules.setdefault(text.lstrip("?!"), [])
        elif kind is not None and kind != "line" and text != ":":
            body.append((kind, text))
    return rules


def _rule_has_text(rules: dict[str, list[_Token]], name: str, has: _Has) -> bool:
    """A terminal, a word of the library or an unknown name counts as one that has."""
    if name not in rules or name.isupper():
        return True
    found, stop = _alternatives(rules[name], 0, has)
    return found or stop < len(rules[name])  # a body that ends early was not understood


def _alternatives(body: list[_Token], start: int, has: _Has) -> tuple[bool, int]:
    """Whether one of the alternatives from `start` on has a text, and where they end."""
    some, whole, place = False, True, start
    while place < len(body) and body[place][1] not in (")", "]"):
        kind, text = body[place]
        place += 1
        if (kind, text) == ("mark", "|"):
            some, whole = some or whole, True
            continue
        item = True
        if kind == "name":
            item = has(text)
        elif text in ("(", "["):
            item, place = _alternatives(body, place, has)
            item, place = item or text == "[", place + 1
        if place < len(body) and body[place] in (("mark", "?"), ("mark", "*")):
            item, place = True, place + 1
        whole = whole and item
    return some or whole, place
