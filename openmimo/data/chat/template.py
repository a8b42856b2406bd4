"""Conversations to text, with the checkpoint's own Jinja template or MiMo's (`mimo_chat.jinja`).

Templates run in the sandbox and with the extras that Hugging Face gives them, so one template gives one text here and
there: blocks trimmed, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, loop controls, and the
`generation` block.

A conversation is untrusted text. `render` can mark the special tokens that the template itself writes, so that the same
words in a message, a tool or an argument stay text, wherever they stand and however they are joined.
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
from openmimo.core.records import Message
from openmimo.data.chat.tool_arguments import read_arguments


def render(
    messages: Iterable[Message | Mapping[str, Any]],
    *,
    template: str | None = None,
    tools: Iterable[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
    enable_thinking: bool = False,
    keep_all_reasoning: bool = False,
    special_tokens: Mapping[str, str] | None = None,
    marks: Mapping[str, str] | None = None,
) -> str:
    """The text of a conversation.

    messages: `Message` records, or dicts in OpenAI's form. template: Jinja source; None is MiMo's. tools: function
    schemas in OpenAI's form, with or without the outer `{"type": "function", "function": ...}`. enable_thinking: leave
    the model to open its own `<think>`. keep_all_reasoning: show the reasoning of turns before the last question too.
    special_tokens: names such as `eos_token` that a template may print. marks: special tokens, and for each the lone
    surrogate that stands for it where the template writes it. A conversation that holds a lone surrogate is refused, so
    a mark in the result is the template's. Raises DataError for a template or a conversation that does not render.
    """
    conversation = {
        "messages": [message_dict(message) for message in messages],
        "tools": [_tool_dict(tool) for tool in tools] or None,
    }
    variables = {
        **{name: _marked(text, marks or {}) for name, text in (special_tokens or {}).items()},
        **conversation,
        "add_generation_prompt": add_generation_prompt,
        "enable_thinking": enable_thinking,
        "keep_all_reasoning": keep_all_reasoning,
    }
    try:
        if marks is not None:
            _check_no_surrogates(conversation)
        return _compile(mimo_template() if template is None else template, tuple((marks or {}).items())).render(
            variables
        )
    except RecursionError as error:
        raise DataError("The chat template cannot render this conversation: it is nested too deeply.") from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise DataError(f"The chat template cannot render this conversation: {error}") from error


def check_template(source: str, path: Path) -> None:
    """Raises DataError, naming `path` and where it can the line, for a chat template that is no Jinja."""
    try:
        _compile(source, ())
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{path}: the chat_template is not valid: line {error.lineno}: {error}") from error
    except (RecursionError, ValueError, SyntaxError) as error:  # nested too deeply, a number of too many digits
        raise DataError(f"{path}: the chat_template is not valid: {error}") from error


@functools.cache
def mimo_template() -> str:
    """The Jinja source of MiMo's own chat format."""
    return Path(__file__).with_name("mimo_chat.jinja").read_text(encoding="utf-8")


def message_dict(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    """One turn as templates expect it: text content, and tool calls whose arguments are a dict. Raises DataError."""
    if isinstance(message, Message):
        message = {
            "role": message.role,
            "content": message.content,
            "reasoning_content": message.reasoning_content,
            "tool_calls": message.tool_calls,
        }
    if not isinstance(message.get("role"), str):
        raise DataError(f"A message of the conversation has no 'role': {message!r}.")
    turn = {**message, "content": _content_text(message.get("content"))}
    for optional in ("reasoning_content", "tool_calls"):
        if not turn.get(optional):
            turn.pop(optional, None)
    if "tool_calls" in turn:
        turn["tool_calls"] = [_tool_call_dict(call) for call in turn["tool_calls"]]
    return turn


def _content_text(content: Any) -> str:
    """OpenAI allows text, nothing, or a list of parts; only text parts can be rendered."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(map(_is_text_part, content)):
        return "".join(part["text"] for part in content)
    raise DataError("The content of a message must be text, or a list of {'type': 'text', 'text': ...} parts.")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _tool_call_dict(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"A tool call has no function name: {call!r}.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = read_arguments(arguments)
    elif arguments is None or isinstance(arguments, Mapping):
        arguments = dict(arguments or {})
    else:
        raise DataError(
            f"The arguments of tool call {function['name']!r} must be a JSON object or a text, not {arguments!r}."
        )
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tool_dict(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"A tool has no function name: {tool!r}.")
    return {"type": "function", "function": dict(function)}


def _check_no_surrogates(conversation: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(conversation, ensure_ascii=False, default=str)
    except (TypeError, ValueError) as error:
        raise DataError(f"A conversation and its tools must be JSON values ({error}).") from error
    if found := _SURROGATE.search(text):
        raise DataError(
            f"The conversation holds the lone surrogate {found[0]!r}, half of a character that stands for nothing. "
            "Leave it out."
        )


_SURROGATE = re.compile("[\ud800-\udfff]")


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training masks in some templates; here it only renders its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compile(source: str, marks: tuple[tuple[str, str], ...]) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    tree = environment.parse(_SURROGATE.sub("\ufffd", source))
    _mark_literals(tree, dict(marks))
    return environment.from_string(tree)


# Methods and filters whose (first) argument is looked for in a text, not written.
_SEARCHES = frozenset(
    ["startswith", "endswith", "split", "rsplit", "partition", "rpartition", "strip", "lstrip", "rstrip", "find",
     "removeprefix", "removesuffix", "rfind", "index", "rindex", "count", "replace"]
)  # fmt: skip


def _mark_literals(node: jinja2.nodes.Node, marks: Mapping[str, str]) -> None:
    """Puts marks for the special tokens in what the template writes, not in what it compares a text with."""
    match node:
        case jinja2.nodes.TemplateData():
            node.data = _marked(node.data, marks)
        case jinja2.nodes.Const(value=str() as text):
            node.value = _marked(text, marks)
    for child in _written(node):
        _mark_literals(child, marks)


def _written(node: jinja2.nodes.Node) -> Iterable[jinja2.nodes.Node]:
    """The parts of a node of which something may be written."""
    match node:
        case jinja2.nodes.Compare() | jinja2.nodes.Test():
            return ()
        case jinja2.nodes.Call(node=jinja2.nodes.Getattr(attr=name)) if name in _SEARCHES:
            return (node.node, *node.args[1:])
        case jinja2.nodes.Filter(name=name) if name in _SEARCHES:
            return (*([node.node] if node.node else []), *node.args[1:])
    return node.iter_child_nodes()


def _marked(text: str, marks: Mapping[str, str]) -> str:
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
