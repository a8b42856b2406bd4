"""Jinja chat templates, compiled with the settings of Hugging Face.

These are a sandbox, trimmed blocks, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, loop controls and
the `generation` block. A template therefore renders the same text as in transformers. A compiled template can replace
the special tokens that it writes by marker characters.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from openmimo.core.errors import DataError

SURROGATE = re.compile("[\ud800-\udfff]")
_MIMO_SYSTEM = "You are MiMo, a helpful AI assistant engineered by Xiaomi."


def check_template(source: str, path: Path) -> None:
    """Raise DataError if a chat template is not valid Jinja. The message has `path` and, where known, the line."""
    try:
        compile_template(source, ())
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{path}: the chat_template is not valid: line {error.lineno}: {error}") from error
    except (RecursionError, ValueError, SyntaxError) as error:  # too deeply nested, or a number with too many digits
        raise DataError(f"{path}: the chat_template is not valid: {error}") from error


@functools.cache
def mimo_template() -> str:
    """Return the Jinja source of MiMo's chat format."""
    return Path(__file__).with_name("mimo_chat.jinja").read_text(encoding="utf-8")


@functools.cache
def trained_template() -> str:
    """Return the Jinja source for models with a new tokenizer: MiMo's format with an empty default system message.

    Such a model is not MiMo, and the tasks train it with an empty system message.
    """
    return mimo_template().replace(f"'{_MIMO_SYSTEM}'", "''")


class _GenerationBlock(jinja2.ext.Extension):
    """Renders the body of `{% generation %}`, which marks assistant text for training masks in some templates."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def compile_template(source: str, marks: tuple[tuple[str, str], ...]) -> jinja2.Template:
    """Compile a template. Each special token in its literals is replaced by its marker from `marks`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    tree = environment.parse(SURROGATE.sub("\ufffd", source))
    _mark_literals(tree, dict(marks))
    return environment.from_string(tree)


# Methods and filters that search a text for their first argument and do not write it.
_SEARCHES = frozenset(
    ["startswith", "endswith", "split", "rsplit", "partition", "rpartition", "strip", "lstrip", "rstrip", "find",
     "removeprefix", "removesuffix", "rfind", "index", "rindex", "count", "replace"]
)  # fmt: skip


def _mark_literals(node: jinja2.nodes.Node, marks: Mapping[str, str]) -> None:
    """Replace special tokens by markers in literals that the template writes, but not in those it compares with."""
    match node:
        case jinja2.nodes.TemplateData():
            node.data = marked(node.data, marks)
        case jinja2.nodes.Const(value=str() as text):
            node.value = marked(text, marks)
    for child in _written(node):
        _mark_literals(child, marks)


def _written(node: jinja2.nodes.Node) -> Iterable[jinja2.nodes.Node]:
    """Return the child nodes whose text may be written."""
    match node:
        case jinja2.nodes.Compare() | jinja2.nodes.Test():
            return ()
        case jinja2.nodes.Call(node=jinja2.nodes.Getattr(attr=name)) if name in _SEARCHES:
            return (node.node, *node.args[1:])
        case jinja2.nodes.Filter(name=name) if name in _SEARCHES:
            return (*([node.node] if node.node else []), *node.args[1:])
    return node.iter_child_nodes()


def marked(text: str, marks: Mapping[str, str]) -> str:
    """Replace each special token in `text` by its marker, longer tokens first."""
    if not marks:
        return text
    longest_first = sorted(marks, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda found: marks[found[0]], text)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(date_format: str) -> str:
    return datetime.now().strftime(date_format)
