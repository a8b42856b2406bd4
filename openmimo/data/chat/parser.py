"""Streaming parser of replies in MiMo's chat format into reasoning, content and tool calls.

    <think>reasoning</think>content<tool_call>
    <function=NAME>
    <parameter=NAME>value</parameter>
    </function>
    </tool_call>

The stream is first split into tags and text. The parser state then decides what a tag means; a tag without a meaning in
that state is text. No text is lost except white space between the tags of a call, and the events do not depend on how
the stream is divided.

- The first `</parameter>` ends a value. Without it, a value ends before `<parameter=NAME>` on a new line, if the
  function has that parameter; before `</function>`, white space and `</tool_call>`; and before `<tool_call>` and the
  opening of a known function. In the last two cases, a `</parameter>` directly after them makes all of it part of the
  value. Any other tag inside is part of the value. A line end before the ending tag is not.
- Text between the parameters of a call, and a repeated parameter, is emitted as text after the call.
- A call without `</function>` ends at `</tool_call>`, `<tool_call>` or a thinking tag.
- If the stream ends inside a call, its arguments remain invalid JSON (`{` if there are none) and no ToolCallEnd is
  emitted, so that it is not mistaken for a complete call. An incomplete tag at that point is dropped.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from openmimo.data.chat.tool_arguments import ArgumentValue, argument_types, quoted
from openmimo.data.tokenizer import THINK_END, THINK_START

_BLOCK, _END_OF_BLOCK = "<tool_call>", "</tool_call>"
_FUNCTION, _END_OF_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_OF_PARAMETER = "<parameter=", "</parameter>"
_FIXED_TAGS = (THINK_START, THINK_END, _BLOCK, _END_OF_BLOCK, _END_OF_FUNCTION, _END_OF_PARAMETER)

# The length of names is limited, which limits the text that is held back as a possible tag.
_NAME = r"(?:<function=|<parameter=)[^<>\n]"
_TAG = re.compile("|".join([*_FIXED_TAGS, _NAME + "{1,256}>"]))
_PARTIAL_NAME = re.compile(_NAME + "{0,256}")


# What may end a value without `</parameter>`: transitions from a state and a tag to the next state. White space may
# separate the tags.
_ENDINGS = {
    ("", _END_OF_FUNCTION): "function end",
    ("", _END_OF_BLOCK): "block end",
    ("", _BLOCK): "block",
    ("function end", _END_OF_FUNCTION): "function end",
    ("function end", _END_OF_BLOCK): "call end",
    ("function end", _BLOCK): "block",
    ("block end", _BLOCK): "block",
    ("block", _FUNCTION): "new call",
    ("new call", _END_OF_FUNCTION): "new call's function end",
    ("new call's function end", _END_OF_BLOCK): "new call's end",
}
# In these states, only a `</parameter>` directly after the tags can make them part of the value.
_VALUE_ENDED = frozenset(["call end", "new call", "new call's function end", "new call's end"])


@dataclass(frozen=True)
class ReasoningText:
    """A piece of the reasoning."""

    text: str


@dataclass(frozen=True)
class ContentText:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """Start of a call of function `name`. `index` counts the calls from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """A piece of the JSON object of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """End of a complete call. The pieces of its arguments join to one JSON object."""

    index: int


ChatEvent = ReasoningText | ContentText | ToolCallStart | ToolCallArguments | ToolCallEnd


class _ParserState(Enum):
    """Position in the grammar."""

    TEXT = auto()  # in reasoning or content
    BLOCK = auto()  # after <tool_call>
    CALL = auto()  # after <function=NAME> or a parameter
    VALUE = auto()  # after <parameter=NAME>
    AFTER_CALL = auto()  # after </function>


class ChatParser:
    """Parser of one reply. Its time is linear in the length of the reply, and it never raises.

    The schemas of the tools determine the types of arguments. A value of string type is taken literally. A value of
    another type is JSON, or a string if it is not valid JSON. If the schema has no type, or allows strings and other
    types, JSON of a type other than string is taken as JSON (`5`, `null`, `[1]`), and anything else as a string. Calls
    of functions that are not among the tools are also recognized.
    """

    def __init__(
        self, *, tools: Iterable[Mapping[str, Any]] = (), starts_thinking: bool = False, reads_calls: bool = True
    ):
        """
        Args:
            tools: The functions in the prompt, in OpenAI's form.
            starts_thinking: Whether the prompt ends with `<think>`.
            reads_calls: Whether tool calls are parsed; otherwise, their tags are text.
        """
        self._reads_calls = reads_calls
        self._schemas = dict(map(_name_and_schema, tools))
        self._is_thinking = starts_thinking
        self._state = _ParserState.TEXT
        self._events: list[ChatEvent] = []
        self._partial_tag = ""
        self._tentative: list[str] = []  # markup if a call follows, else text
        self._num_calls = 0
        self._function = ""
        self._arguments: set[str] = set()
        self._between: list[str] = []  # text and tags since the last tag of the call
        self._misplaced: list[str] = []  # text to emit after the call
        self._value = ArgumentValue(())
        self._held: list[str] = []  # end of the value that may not belong to it: a line end, tags, white space
        self._ending = ""  # state of the held tags in _ENDINGS

    def push(self, text: str) -> list[ChatEvent]:
        """Return the events of `text` in order. Text that may begin a tag is held back until the next push."""
        text = self._partial_tag + text
        end = 0
        for tag in _TAG.finditer(text):
            self._take_text(text[end : tag.start()])
            self._take_tag(tag[0])
            end = tag.end()
        self._partial_tag = _partial_tag(text[end:])
        self._take_text(text[end : len(text) - len(self._partial_tag)])
        return self._new_events()

    def finish(self) -> list[ChatEvent]:
        """Return the events of the text that was held back, at the end of the stream."""
        partial, self._partial_tag = self._partial_tag, ""
        if self._state is _ParserState.VALUE and self._ending in _VALUE_ENDED:
            self._end_open_value()
        if self._state in (_ParserState.TEXT, _ParserState.BLOCK):
            self._take_text(partial)
        if self._state is _ParserState.VALUE:
            self._emit_arguments(self._value.cut())
        if self._state in (_ParserState.CALL, _ParserState.VALUE):
            self._emit_arguments("" if self._arguments else "{")
            self._release_misplaced()
        self._release_tentative()
        return self._new_events()

    def _new_events(self) -> list[ChatEvent]:
        events, self._events = self._events, []
        return list(_merged(events))

    def _take_text(self, text: str) -> None:
        if not text:
            return
        match self._state:
            case _ParserState.TEXT:
                self._emit_text(text)
            case _ParserState.BLOCK | _ParserState.AFTER_CALL:
                self._tentative.append(text)
                if not text.isspace():
                    self._release_tentative()
            case _ParserState.CALL:
                self._between.append(text)
            case _ParserState.VALUE:
                self._take_text_in_value(text)

    def _take_tag(self, tag: str) -> None:
        match self._state:
            case _ParserState.TEXT:
                self._take_tag_in_text(tag)
            case _ParserState.BLOCK | _ParserState.AFTER_CALL:
                self._take_tag_around_calls(tag)
            case _ParserState.CALL:
                self._take_tag_in_call(tag)
            case _ParserState.VALUE:
                self._take_tag_in_value(tag)

    def _take_tag_in_text(self, tag: str) -> None:
        if tag == (THINK_END if self._is_thinking else THINK_START):
            self._is_thinking = not self._is_thinking
        elif tag == _BLOCK and self._reads_calls:
            self._state = _ParserState.BLOCK
            self._tentative = [tag]
        else:
            self._emit_text(tag)

    def _take_tag_around_calls(self, tag: str) -> None:
        if tag.startswith(_FUNCTION):
            self._tentative = []
            self._begin_call(_name_in(tag))
        elif tag == _END_OF_BLOCK and self._state is _ParserState.AFTER_CALL:
            self._tentative = []
            self._state = _ParserState.TEXT
        else:
            self._release_tentative()
            self._take_tag_in_text(tag)

    def _take_tag_in_call(self, tag: str) -> None:
        if tag.startswith(_PARAMETER) and _name_in(tag) not in self._arguments:
            self._begin_value(_name_in(tag))
        elif tag == _END_OF_FUNCTION:
            self._end_call(_ParserState.AFTER_CALL)
        elif tag == _END_OF_BLOCK:
            self._end_call(_ParserState.TEXT)
        elif tag in (THINK_START, THINK_END, _BLOCK):
            self._end_call(_ParserState.TEXT)
            self._take_tag_in_text(tag)
        else:
            self._between.append(tag)

    def _take_text_in_value(self, text: str) -> None:
        if self._ending and text.isspace():
            self._held.append(text)
        elif self._ending in _VALUE_ENDED:
            self._end_open_value()
            self._take_text(text)
        else:
            self._extend_value(text)

    def _take_tag_in_value(self, tag: str) -> None:
        if tag == _END_OF_PARAMETER:
            self._emit_arguments(self._value.push("".join(self._held)))
            self._end_value()
            return
        key = _FUNCTION if self._opens_known_function(tag) else tag
        if (self._ending, key) not in _ENDINGS:
            if self._ending in _VALUE_ENDED:
                self._end_open_value()
                self._take_tag(tag)
                return
            self._extend_value("")
            if self._held and tag.startswith(_PARAMETER) and self._has_parameter(_name_in(tag)):
                self._end_value()
                self._take_tag(tag)
                return
        if (self._ending, key) in _ENDINGS:
            self._held.append(tag)
            self._ending = _ENDINGS[self._ending, key]
        else:
            self._extend_value(tag)

    def _extend_value(self, text: str) -> None:
        """Append the held text and `text` to the value; hold back a line end at their end."""
        text = "".join(self._held) + text
        kept = text.removesuffix("\n")
        self._held, self._ending = ["\n"] if kept != text else [], ""
        self._emit_arguments(self._value.push(kept))

    def _end_value(self) -> None:
        self._emit_arguments(self._value.finish())
        self._held, self._ending = [], ""
        self._state = _ParserState.CALL

    def _end_open_value(self) -> None:
        """End the value before the held tags, and parse these."""
        held = self._held[self._held[0] == "\n" :]
        self._end_value()
        for piece in held:
            if piece.isspace():
                self._take_text(piece)
            elif piece != _END_OF_FUNCTION or self._state is _ParserState.CALL:  # a second one is redundant
                self._take_tag(piece)

    def _opens_known_function(self, tag: str) -> bool:
        return tag.startswith(_FUNCTION) and (not self._schemas or _name_in(tag) in self._schemas)

    def _has_parameter(self, name: str) -> bool:
        """Return whether the function may have the parameter. A function without listed parameters may have any."""
        schema = self._schemas.get(self._function)
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        return not properties or not isinstance(properties, Mapping) or name in properties

    def _begin_call(self, name: str) -> None:
        self._state = _ParserState.CALL
        self._function = name
        self._arguments = set()
        self._events.append(ToolCallStart(self._num_calls, name))
        self._num_calls += 1

    def _begin_value(self, name: str) -> None:
        self._keep_misplaced()
        self._state = _ParserState.VALUE
        self._emit_arguments(f"{', ' if self._arguments else '{'}{quoted(name)}: ")
        self._arguments.add(name)
        self._value = ArgumentValue(argument_types(self._schemas.get(self._function), name))

    def _end_call(self, state: _ParserState) -> None:
        self._emit_arguments("}" if self._arguments else "{}")
        self._events.append(ToolCallEnd(self._num_calls - 1))
        self._release_misplaced()
        self._state = state

    def _keep_misplaced(self) -> None:
        between = "".join(self._between)
        self._between = []
        if not between.isspace():
            self._misplaced.append(between)

    def _release_misplaced(self) -> None:
        self._keep_misplaced()
        self._emit_text("".join(self._misplaced))
        self._misplaced = []

    def _release_tentative(self) -> None:
        self._emit_text("".join(self._tentative))
        self._tentative = []
        self._state = _ParserState.TEXT

    def _emit_text(self, text: str) -> None:
        if text:
            self._events.append(ReasoningText(text) if self._is_thinking else ContentText(text))

    def _emit_arguments(self, json_text: str) -> None:
        if json_text:
            self._events.append(ToolCallArguments(self._num_calls - 1, json_text))


def _partial_tag(text: str) -> str:
    """Return the end of `text` that may begin a tag. A tag contains `<` only as its first character."""
    start = text.rfind("<")
    tail = text[start:] if start >= 0 else ""
    named = (_FUNCTION, _PARAMETER)
    is_partial = any(tag.startswith(tail) for tag in (*_FIXED_TAGS, *named)) or _PARTIAL_NAME.fullmatch(tail)
    return tail if is_partial else ""


def _name_in(tag: str) -> str:
    return tag.partition("=")[2][:-1]


def _merged(events: Sequence[ChatEvent]) -> Iterator[ChatEvent]:
    """Join consecutive text events of one type. The arguments of two calls are separated by the start of a call."""
    for _, group in itertools.groupby(events, type):
        first, *others = group
        if isinstance(first, ToolCallStart | ToolCallEnd):
            yield from (first, *others)
        else:
            texts = [event.text for event in others if isinstance(event, type(first))]
            yield replace(first, text="".join([first.text, *texts]))


def _name_and_schema(tool: Mapping[str, Any]) -> tuple[str, Any]:
    function = tool.get("function", tool)
    return function["name"], function.get("parameters")
