"""Episodes whose policy calls functions in MiMo's chat format: parses and checks calls, and responds in tool turns.

Errors of a call are returned to the model and never raised, so that the model can learn from them (section 4.3.2).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openmimo.core.records import Message
from openmimo.data.chat.parser import (
    ChatEvent,
    ChatParser,
    ContentText,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from openmimo.rl.agents.environment import EnvResponse
from openmimo.rl.toolbox import ToolMistakeError

_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}
_MARKS = ("<tool_call>", "</tool_call>", "<function=", "</function>")


@dataclass(frozen=True)
class ToolCall:
    """A call that the policy wrote. `error` says what is wrong with it; "" for nothing."""

    name: str
    arguments: Mapping[str, Any]
    error: str = ""


@dataclass(frozen=True)
class Reply:
    """The text and the calls of one policy turn. `content` excludes reasoning and calls."""

    content: str
    calls: tuple[ToolCall, ...] = ()


def function_tool(name: str, description: str, parameters: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The schema of a function in OpenAI's format. parameters: name to (JSON type, description); all are required."""
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def read_reply(text: str, tools: Sequence[Mapping[str, Any]]) -> Reply:
    """Parses a turn. Never raises: a malformed call or a call of an unknown tool has an error."""
    parser = ChatParser(tools=tools)
    events = [*parser.push(text), *parser.finish()]
    content = "".join(event.text for event in events if isinstance(event, ContentText)).strip()
    calls = _calls(events, tools)
    if any(mark in content for mark in _MARKS):
        calls.append(ToolCall("", {}, "a call is malformed; see how the system turn writes one"))
    return Reply(content, tuple(calls))


def _calls(events: Sequence[ChatEvent], tools: Sequence[Mapping[str, Any]]) -> list[ToolCall]:
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    ended = set()
    for event in events:
        if isinstance(event, ToolCallStart):
            names[event.index], arguments[event.index] = event.name, ""
        elif isinstance(event, ToolCallArguments):
            arguments[event.index] += event.text
        elif isinstance(event, ToolCallEnd):
            ended.add(event.index)
    return [
        _checked(name, arguments[index], tools) if index in ended else ToolCall(name, {}, "the call has no end")
        for index, name in names.items()
    ]


def _checked(name: str, arguments: str, tools: Sequence[Mapping[str, Any]]) -> ToolCall:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if name not in schemas:
        return ToolCall(name, {}, f"there is no function {name!r}; there are {', '.join(schemas)}")
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        return ToolCall(name, {}, "the arguments cannot be read")
    properties = schemas[name]["properties"]
    missing = [key for key in schemas[name]["required"] if key not in values]
    unknown = [key for key in values if key not in properties]
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has no parameter {', '.join(unknown)}"
        return ToolCall(name, values, f"{name} {problem}")
    for key, value in values.items():
        kind = properties[key]["type"]
        if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
            return ToolCall(name, values, f"{key} of {name} must be of type {kind}")
    return ToolCall(name, values)


class ChatToolEpisode(ABC):
    """The turns of an agent with tools. A subclass runs the tools and computes the reward.

    Args:
        messages: The conversation before the policy's first turn.
        tools: Function schemas.
        max_calls: Number of calls (malformed ones included) after which the episode ends with the next turn.

    Attributes:
        content: The text of the policy's last turn.
        is_over: A tool may set it to end the episode.
    """

    stop: tuple[str, ...] = ()

    def __init__(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], max_calls: int):
        self.messages, self.tools = tuple(messages), tuple(tools)
        self.content, self.is_over = "", False
        self._calls_left = max_calls

    @abstractmethod
    def run(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Runs a call whose arguments match its schema. Raises ToolMistakeError for mistakes of the model."""

    @abstractmethod
    def reward(self) -> float:
        """The reward of the finished episode, 0 to 1."""

    def close(self) -> None:  # noqa: B027 (an episode without resources has nothing to release)
        """Release the resources of the episode."""

    def respond(self, text: str) -> EnvResponse:
        """Runs the calls of a turn. A turn without a call is the last."""
        reply = read_reply(text, self.tools)
        self.content = reply.content
        if not reply.calls or self._calls_left <= 0:
            return EnvResponse()
        turns = []
        for call in reply.calls:
            turns.append(Message("tool", self._result(call)))
            if self.is_over:
                return EnvResponse()
        return EnvResponse(messages=tuple(turns))

    def _result(self, call: ToolCall) -> str:
        if self._calls_left <= 0:
            return "error: no call is left; answer now"
        self._calls_left -= 1
        try:
            if call.error:
                raise ToolMistakeError(call.error)
            text = self.run(call.name, call.arguments)
        except ToolMistakeError as mistake:
            text = f"error: {mistake}"
        return text if self._calls_left else f"{text}\n(no call is left; answer now)"
