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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from openmimo.core.records import Structure
from openmimo.engine.structure_schema import known_keywords, part_at

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
