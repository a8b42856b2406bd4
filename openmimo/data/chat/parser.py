"""The text of a reply in MiMo's chat format to reasoning, content and tool calls, as it comes.

    <think>reasoning</think>content<tool_call>
    <function=NAME>
    <parameter=NAME>value</parameter>
    </function>
    </tool_call>

Marks are cut out of the stream first, everywhere alike; what a mark means depends on where it stands, and a mark that
means nothing there is text. So nothing is lost, and the events do not depend on how the text was cut. Only blanks
between the marks of a call are left out.

- The first `</parameter>` ends a value. Where it is missing, a value ends before `<parameter=NAME>` on a new line, if
  the function has such a parameter; before `</function>`, blanks and `</tool_call>`; and before `<tool_call>` and the
  opening of a known function. In the last two cases a `</parameter>` that follows at once makes all of it part of the
  value. Any other mark inside is part of the value. The line end before such a mark is not.
- Text between the parameters of a call, and a parameter that the call already has, comes out as text after the call.
- A call without `</function>` ends where `</tool_call>`, `<tool_call>` or a thinking mark stands instead.
- A call that the end of the stream cuts off is left open: its arguments are no valid JSON (`{` if none has begun) and
  no ToolCallEnd comes, so half a call is never taken for a whole one. A mark that the cut left unfinished is dropped.
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
_FIXED_MARKS = (THINK_START, THINK_END, _BLOCK, _END_OF_BLOCK, _END_OF_FUNCTION, _END_OF_PARAMETER)

# Names are bounded, so that what may become a mark is held back for so many characters and no more.
_NAME = r"(?:<function=|<parameter=)[^<>\n]"
_MARK = re.compile("|".join([*_FIXED_MARKS, _NAME + "{1,256}>"]))
_BEGUN_NAME = re.compile(_NAME + "{0,256}")


# What may end a value that lacks `</parameter>`: from a state and a mark to the next state. Blanks may stand between.
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
# In these states only a `</parameter>` that follows at once can still make the marks a part of the value.
_ENDED = frozenset(["call end", "new call", "new call's function end", "new call's end"])


@dataclass(frozen=True)
class ReasoningText:
    """A piece of the thinking."""

    text: str


@dataclass(frozen=True)
class ContentText:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call of the function `name` begins; calls are counted from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """A piece of the JSON object of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """The call is whole: the pieces of its arguments are one JSON object."""

    index: int


ChatEvent = ReasoningText | ContentText | ToolCallStart | ToolCallArguments | ToolCallEnd


class _ParserState(Enum):
    """Where in the format the stream is."""

    TEXT = auto()  # in thinking or in content
    BLOCK = auto()  # after <tool_call>
    CALL = auto()  # after <function=NAME> or a parameter
    VALUE = auto()  # after <parameter=NAME>
    AFTER_CALL = auto()  # after </function>


class ChatParser:
    """One reply's parser. It takes time linear in the reply's length, however it is cut, and never raises.

    tools: the functions that the model was shown, in OpenAI's form. Their schemas say which arguments are strings: a
    value for a string is taken as it is, any other as JSON, or as a string if it is none. Where the schema is silent,
    or allows strings and other things, JSON of another type than string wins (`5`, `null`, `[1]`), else it is a
    string. Calls are recognized whether or not their function is among the tools.
    starts_thinking: whether the prompt's end has opened `<think>`. reads_calls: whether there may be calls; without,
    their markup is text like any other.
    """

    def __init__(
        self, *, tools: Iterable[Mapping[str, Any]] = (), starts_thinking: bool = False, reads_calls: bool = True
    ):
        self._reads_calls = reads_calls
        self._schemas = dict(map(_name_and_schema, tools))
        self._is_thinking = starts_thinking
        self._state = _ParserState.TEXT
        self._events: list[ChatEvent] = []
        self._begun_mark = ""
        self._doubtful: list[str] = []  # what is markup if a call follows, and else text
        self._num_calls = 0
        self._function = ""
        self._arguments: set[str] = set()
        self._between: list[str] = []  # what came since the last mark of the call
        self._misplaced: list[str] = []  # what comes out after the call
        self._value = ArgumentValue(())
        self._held: list[str] = []  # the end of a value that may not belong to it: a line end, marks, blanks
        self._ending = ""  # how far the held marks have come in _ENDINGS

    def push(self, text: str) -> list[ChatEvent]:
        """What `text` adds, in order; text that may be the beginning of a mark waits for the next push."""
        text = self._begun_mark + text
        end = 0
        for mark in _MARK.finditer(text):
            self._take_text(text[end : mark.start()])
            self._take_mark(mark[0])
            end = mark.end()
        self._begun_mark = _begun_mark(text[end:])
        self._take_text(text[end : len(text) - len(self._begun_mark)])
        return self._new_events()

    def finish(self) -> list[ChatEvent]:
        """What was held back, now that nothing follows."""
        begun, self._begun_mark = self._begun_mark, ""
        if self._state is _ParserState.VALUE and self._ending in _ENDED:
            self._end_open_value()
        if self._state in (_ParserState.TEXT, _ParserState.BLOCK):
            self._take_text(begun)
        if self._state is _ParserState.VALUE:
            self._argue(self._value.cut())
        if self._state in (_ParserState.CALL, _ParserState.VALUE):
            self._argue("" if self._arguments else "{")
            self._release_misplaced()
        self._release_doubtful()
        return self._new_events()

    def _new_events(self) -> list[ChatEvent]:
        events, self._events = self._events, []
        return list(_merged(events))

    def _take_text(self, text: str) -> None:
        if not text:
            return
        match self._state:
            case _ParserState.TEXT:
                self._say(text)
            case _ParserState.BLOCK | _ParserState.AFTER_CALL:
                self._doubtful.append(text)
                if not text.isspace():
                    self._release_doubtful()
            case _ParserState.CALL:
                self._between.append(text)
            case _ParserState.VALUE:
                self._take_text_in_value(text)

    def _take_mark(self, mark: str) -> None:
        match self._state:
            case _ParserState.TEXT:
                self._take_mark_in_text(mark)
            case _ParserState.BLOCK | _ParserState.AFTER_CALL:
                self._take_mark_around_calls(mark)
            case _ParserState.CALL:
                self._take_mark_in_call(mark)
            case _ParserState.VALUE:
                self._take_mark_in_value(mark)

    def _take_mark_in_text(self, mark: str) -> None:
        if mark == (THINK_END if self._is_thinking else THINK_START):
            self._is_thinking = not self._is_thinking
        elif mark == _BLOCK and self._reads_calls:
            self._state = _ParserState.BLOCK
            self._doubtful = [mark]
        else:
            self._say(mark)

    def _take_mark_around_calls(self, mark: str) -> None:
        if mark.startswith(_FUNCTION):
            self._doubtful = []
            self._begin_call(_name_in(mark))
        elif mark == _END_OF_BLOCK and self._state is _ParserState.AFTER_CALL:
            self._doubtful = []
            self._state = _ParserState.TEXT
        else:
            self._release_doubtful()
            self._take_mark_in_text(mark)

    def _take_mark_in_call(self, mark: str) -> None:
        if mark.startswith(_PARAMETER) and _name_in(mark) not in self._arguments:
            self._begin_value(_name_in(mark))
        elif mark == _END_OF_FUNCTION:
            self._end_call(_ParserState.AFTER_CALL)
        elif mark == _END_OF_BLOCK:
            self._end_call(_ParserState.TEXT)
        elif mark in (THINK_START, THINK_END, _BLOCK):
            self._end_call(_ParserState.TEXT)
            self._take_mark_in_text(mark)
        else:
            self._between.append(mark)

    def _take_text_in_value(self, text: str) -> None:
        if self._ending and text.isspace():
            self._held.append(text)
        elif self._ending in _ENDED:
            self._end_open_value()
            self._take_text(text)
        else:
            self._grow_value(text)

    def _take_mark_in_value(self, mark: str) -> None:
        if mark == _END_OF_PARAMETER:
            self._argue(self._value.push("".join(self._held)))
            self._end_value()
            return
        key = _FUNCTION if self._opens_known_function(mark) else mark
        if (self._ending, key) not in _ENDINGS:
            if self._ending in _ENDED:
                self._end_open_value()
                self._take_mark(mark)
                return
            self._grow_value("")
            if self._held and mark.startswith(_PARAMETER) and self._has_parameter(_name_in(mark)):
                self._end_value()
                self._take_mark(mark)
                return
        if (self._ending, key) in _ENDINGS:
            self._held.append(mark)
            self._ending = _ENDINGS[self._ending, key]
        else:
            self._grow_value(mark)

    def _grow_value(self, text: str) -> None:
        """What is held and `text` are part of the value, but for a line end at their end, which waits."""
        text = "".join(self._held) + text
        kept = text.removesuffix("\n")
        self._held, self._ending = ["\n"] if kept != text else [], ""
        self._argue(self._value.push(kept))

    def _end_value(self) -> None:
        self._argue(self._value.finish())
        self._held, self._ending = [], ""
        self._state = _ParserState.CALL

    def _end_open_value(self) -> None:
        """The value ended before the held marks, which are now read for what they are."""
        held = self._held[self._held[0] == "\n" :]
        self._end_value()
        for piece in held:
            if piece.isspace():
                self._take_text(piece)
            elif piece != _END_OF_FUNCTION or self._state is _ParserState.CALL:  # a second one says nothing new
                self._take_mark(piece)

    def _opens_known_function(self, mark: str) -> bool:
        return mark.startswith(_FUNCTION) and (not self._schemas or _name_in(mark) in self._schemas)

    def _has_parameter(self, name: str) -> bool:
        """Whether the function of the call has the parameter; one that lists none may have any."""
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
        self._argue(f"{', ' if self._arguments else '{'}{quoted(name)}: ")
        self._arguments.add(name)
        self._value = ArgumentValue(argument_types(self._schemas.get(self._function), name))

    def _end_call(self, state: _ParserState) -> None:
        self._argue("}" if self._arguments else "{}")
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
        self._say("".join(self._misplaced))
        self._misplaced = []

    def _release_doubtful(self) -> None:
        self._say("".join(self._doubtful))
        self._doubtful = []
        self._state = _ParserState.TEXT

    def _say(self, text: str) -> None:
        if text:
            self._events.append(ReasoningText(text) if self._is_thinking else ContentText(text))

    def _argue(self, json_text: str) -> None:
        if json_text:
            self._events.append(ToolCallArguments(self._num_calls - 1, json_text))


def _begun_mark(text: str) -> str:
    """The end of `text` that may become a mark: marks have one `<`, at their beginning."""
    place = text.rfind("<")
    tail = text[place:] if place >= 0 else ""
    named = (_FUNCTION, _PARAMETER)
    is_begun = any(mark.startswith(tail) for mark in (*_FIXED_MARKS, *named)) or _BEGUN_NAME.fullmatch(tail)
    return tail if is_begun else ""


def _name_in(mark: str) -> str:
    return mark.partition("=")[2][:-1]


def _merged(events: Sequence[ChatEvent]) -> Iterator[ChatEvent]:
    """The events with neighboring texts of one kind as one. Between the arguments of two calls a call begins."""
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
