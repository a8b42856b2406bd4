"""Checks that a structure can be compiled, in a child process with limits on time, memory and stack.

llguidance limits most of its work, but some structures pass these limits: a large `multipleOf` or an intersection of
patterns takes minutes, and thousands of chained rules overflow the stack. The library cannot be interrupted. A new
structure is therefore compiled in a child process first. The child works on bytes, so it serves every tokenizer. It
runs this module, which imports llguidance and no torch.

`has_text` also rejects structures without any text of finite length, such as an object that requires itself, or a rule
whose alternatives all need the rule. A structure with parts that the check does not support counts as having a text.
"""

import atexit
import json
import math
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import permutations
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from openmimo.core.records import Structure

# White space between the tokens of JSON: none, a space, or a line end and indent. It is limited, because a model could
# otherwise fill its reply with it.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"( |\n[ \t]{0,24})?"}
_MAX_SOURCE_CHARACTERS = 1 << 18
_MAX_CPU_SECONDS = 2
_MAX_WALL_SECONDS = 60.0
_MAX_MEMORY_BYTES = 1 << 30
_STACK_BYTES = 4 << 20  # below the stack of a thread of the engine
_TRIED_BYTES = 64
_DEAD_END = "NoExtensionBias"  # the error of llguidance if no token is possible
_NO_TEXT = "allows no text"


def new_matcher(tokenizer: LLTokenizer, structure: Structure) -> LLMatcher:
    """Create a matcher at the start of a text. Raises ValueError for a schema that is not JSON."""
    form = _form_grammar(structure)
    start, parts = "start: @form", [{**form, "name": "form"}]
    if structure.alternative:
        start += " | @alternative"
        parts.append({**_regex_grammar(structure.alternative), "name": "alternative"})
    if structure.prefix:
        rule = _regex_grammar(structure.prefix)["lark_grammar"].removeprefix("start:")
        start = f"start: prefix ({start.removeprefix('start: ')})\nprefix[lazy]:{rule}"
    grammars = [{"lark_grammar": start}, *parts] if structure.alternative or structure.prefix else [form]
    grammar = json.dumps({"grammars": grammars})
    return LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))


def _form_grammar(structure: Structure) -> dict[str, Any]:
    """The form without prefix and alternative, as an entry of a list of grammars."""
    if structure.kind == "regex":
        return _regex_grammar(structure.source)
    if structure.kind == "grammar":
        return {"lark_grammar": structure.source}
    root = json.loads(structure.source) if structure.kind == "json_schema" else {"type": "object"}
    schema = json.dumps(known_keywords(root, root))
    return _only_grammar(LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS))


def _regex_grammar(pattern: str) -> dict[str, Any]:
    return _only_grammar(LLMatcher.grammar_from_regex(pattern))


def _only_grammar(serialized: str) -> dict[str, Any]:
    (grammar,) = json.loads(serialized)["grammars"]
    return {name: value for name, value in grammar.items() if value is not None}


# JSON schemas in the keywords that llguidance knows. It refuses `propertyNames`, `uniqueItems` and formats that it does
# not know; pydantic emits all of them.

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
    names = resolved(names, root)
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
    schema = resolved(schema, root)
    parts = schema.get("anyOf") if isinstance(schema, dict) else None
    if not isinstance(parts, list) or schema.keys() - {"anyOf", *_ANNOTATIONS}:
        return _listed_values(schema)
    values: dict[str, Any] = {}
    for part in parts:
        listed = _listed_values(resolved(part, root))
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


def resolved(schema: Any, root: Any) -> Any:
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


def error_of(matcher: LLMatcher) -> str:
    """Return the error of a matcher in one line; "" for none."""
    message = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
    return "no text of this structure continues from here" if message == _DEAD_END else message


class StructureChecker:
    """Starts the child process at the first check, and restarts it after it has died. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def problem(self, structure: Structure) -> str:
        """Return the reason why a structure cannot be used, as the predicate of a sentence about it; "" if it can."""
        num_characters = len(structure.source) + len(structure.prefix) + len(structure.alternative)
        if num_characters > _MAX_SOURCE_CHARACTERS:
            return f"has {num_characters} characters; give at most {_MAX_SOURCE_CHARACTERS}"
        with self._lock:
            answer = self._ask(json.dumps(asdict(structure)))
        if answer:
            return json.loads(answer)
        return (
            f"is too complex: compiling it takes more than {_MAX_CPU_SECONDS} s, {_MAX_MEMORY_BYTES >> 30} GiB or the "
            "stack; simplify it"
        )

    def close(self) -> None:
        """End the child process."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None
            atexit.unregister(self.close)

    def _ask(self, question: str) -> str:
        """Return the reply of the child process; "" if it died."""
        if self._child is None:
            paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "openmimo.engine.structure_check"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, start_new_session=True,
            )  # fmt: skip
            atexit.register(self.close)
        timer = threading.Timer(_MAX_WALL_SECONDS, self._child.kill)
        timer.start()
        try:
            assert self._child.stdin is not None and self._child.stdout is not None
            self._child.stdin.write(question + "\n")
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            self.close()
        return answer


# The rest of this module runs in the child process.


def _serve() -> None:
    """Reply to each line of the input with one line."""
    tokenizer = LLTokenizer("byte")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    for line in sys.stdin:
        limit = math.ceil(time.process_time()) + _MAX_CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        print(json.dumps(_problem(tokenizer, Structure(**json.loads(line)))), flush=True)


def _problem(tokenizer: LLTokenizer, structure: Structure) -> str:
    """As `StructureChecker.problem`, in the child process."""
    try:
        matcher = new_matcher(tokenizer, structure)
    except ValueError as error:
        return f"cannot be read: {error}"
    if matcher.is_error():
        return f"cannot be followed: {error_of(matcher)}"
    return _problem_of_texts(matcher) if has_text(structure) else _NO_TEXT


def _problem_of_texts(matcher: LLMatcher) -> str:
    """Follow one text for some bytes, which finds limits and dead ends that do not occur at the start."""
    is_only_text = True  # so far, every byte was the only possible one, and the text could not end
    for _ in range(_TRIED_BYTES):
        bits = matcher.compute_bitmask()
        if matcher.is_error():
            if _DEAD_END not in matcher.get_error():
                return f"is too complex: {error_of(matcher)}; simplify it"
            return _NO_TEXT if is_only_text else ""
        allowed = [byte for byte in range(256) if bits[byte // 8] >> byte % 8 & 1]
        is_only_text = is_only_text and len(allowed) == 1 and not matcher.is_accepting()
        if not allowed or matcher.is_stopped():
            return ""
        matcher.consume_token(allowed[len(allowed) // 2])
    return ""


_Has = Callable[[str], bool]


def has_text(structure: Structure) -> bool:
    """Return whether any text has this structure, which llguidance must be able to compile."""
    try:
        if structure.kind == "json_schema":
            root = json.loads(structure.source)
            return _least_fixpoint("#", lambda pointer, has: _schema_has_text(part_at(root, pointer), has))
        rules = _rules(structure.source) if structure.kind == "grammar" else None
        return rules is None or _least_fixpoint("start", lambda name, has: _rule_has_text(rules, name, has))
    except RecursionError:  # hundreds of nested parts
        return True


def _least_fixpoint(root: str, evaluate: Callable[[str, _Has], bool]) -> bool:
    """Return whether `root` has a text: the least fixpoint of `evaluate`.

    A round evaluates every name once. A name that occurs inside itself counts as having no text, which may be wrong for
    the names in between. Rounds therefore continue until one proves no further name.

    Args:
        root: The name to evaluate.
        evaluate: evaluate(name, has) returns whether `name` has a text, given `has` for other names.
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


# JSON schemas.


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


# Lark grammars.

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
    """Return the tokens of each rule's body; None for a grammar with unsupported syntax."""
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
    """Return whether a rule has a text. Terminals, names of the library and unknown names count as having one."""
    if name not in rules or name.isupper():
        return True
    found, stop = _alternatives(rules[name], 0, has)
    return found or stop < len(rules[name])  # an early end means unsupported syntax


def _alternatives(body: list[_Token], start: int, has: _Has) -> tuple[bool, int]:
    """Return whether one of the alternatives from `start` on has a text, and the index of their end."""
    some, whole, index = False, True, start
    while index < len(body) and body[index][1] not in (")", "]"):
        kind, text = body[index]
        index += 1
        if (kind, text) == ("mark", "|"):
            some, whole = some or whole, True
            continue
        item = True
        if kind == "name":
            item = has(text)
        elif text in ("(", "["):
            item, index = _alternatives(body, index, has)
            item, index = item or text == "[", index + 1
        if index < len(body) and body[index] in (("mark", "?"), ("mark", "*")):
            item, index = True, index + 1
        whole = whole and item
    return some or whole, index


if __name__ == "__main__":
    threading.stack_size(_STACK_BYTES)
    server = threading.Thread(target=_serve)
    server.start()
    server.join()
