"""The output items and events of a response, built from the events of a chat reply."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openmimo.data.chat.parser import (
    ChatEvent,
    ContentText,
    ReasoningText,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from openmimo.engine.server.chat.turns import ChatReply
from openmimo.engine.server.openai.responses.sealed import seal

Event = dict[str, Any]


@dataclass(frozen=True)
class _TextKind:
    """How the Responses API represents one kind of text.

    Attributes:
        prefix: Beginning of the item's id.
        item: Fields of the item.
        parts: The item's field that contains the part.
        part: The part, still without text.
        part_event: Name of the events of the part, without the last word.
        text_event: Name of the events of the text, without the last word.
        has_logprobs: Whether the part and the events of its text have log-probabilities.
    """

    prefix: str
    item: Mapping[str, Any]
    parts: str
    part: Mapping[str, Any]
    part_event: str
    text_event: str
    has_logprobs: bool = False

    @property
    def index(self) -> dict[str, int]:
        """The position of the part in its item: there is one."""
        return {f"{self.parts}_index": 0}


_MESSAGE = _TextKind(
    "msg",
    {"type": "message", "role": "assistant"},
    "content",
    {"type": "output_text", "text": "", "annotations": []},
    "response.content_part",
    "response.output_text",
    has_logprobs=True,
)
_REASONING = _TextKind(
    "rs",
    {"type": "reasoning", "summary": []},
    "content",
    {"type": "reasoning_text", "text": ""},
    "response.content_part",
    "response.reasoning_text",
)
_SUMMARY = _TextKind(
    "rs",
    {"type": "reasoning"},
    "summary",
    {"type": "summary_text", "text": ""},
    "response.reasoning_summary_part",
    "response.reasoning_summary_text",
)


@dataclass(frozen=True)
class ReasoningForm:
    """How reasoning is returned.

    Attributes:
        is_summary: Whether it is in the field `summary`, which most clients show, instead of `content`.
        is_sealed: Whether it is also in the field `encrypted_content`, which some clients return instead of the text.
    """

    is_summary: bool = False
    is_sealed: bool = False


class OutputItems:
    """The output items of a response, built from the reply's events.

    Each method yields the events of the Responses API, without their sequence numbers.

    Args:
        reply: The reply whose events follow.
        reasoning: How reasoning is returned.
    """

    def __init__(self, reply: ChatReply, reasoning: ReasoningForm):
        self.items: list[dict[str, Any]] = []
        self._reply = reply
        self._reasoning = reasoning
        self._is_open = False
        self._kind: _TextKind | None = None  # of the last item, if it is a text

    def push(self, part: ChatEvent, logprobs: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        """Add one part of the reply, and the log-probabilities of its tokens if it is content."""
        match part:
            case ReasoningText():
                yield from self._add_text(_SUMMARY if self._reasoning.is_summary else _REASONING, part.text)
            case ContentText():
                yield from self._add_text(_MESSAGE, part.text, logprobs)
            case ToolCallStart():
                yield from self.close("completed")
                yield from self._open_call(part.index)
            case ToolCallArguments():
                self.items[-1]["arguments"] += part.text
                yield self._event("response.function_call_arguments.delta", delta=part.text)
            case ToolCallEnd():
                yield from self._end("completed")

    def close(self, status: str) -> Iterator[Event]:
        """End the open item, if any, with `status`: "completed" or "incomplete". An open call is always incomplete."""
        if self._is_open:
            yield from self._end("incomplete" if self._kind is None else status)

    def _end(self, status: str) -> Iterator[Event]:
        self._is_open = False
        item, kind = self.items[-1], self._kind
        item["status"] = status
        if kind is None:
            arguments = item["arguments"]
            yield self._event("response.function_call_arguments.done", arguments=arguments, name=item["name"])
        else:
            part = item[kind.parts][0]
            if item["type"] == "reasoning" and self._reasoning.is_sealed:
                item["encrypted_content"] = seal(part["text"])
            logprobs = {"logprobs": part["logprobs"]} if kind.has_logprobs else {}
            yield self._event(f"{kind.text_event}.done", **kind.index, text=part["text"], **logprobs)
            yield self._event(f"{kind.part_event}.done", **kind.index, part=_copy(part))
        yield self._item_event("response.output_item.done")

    def _add_text(self, kind: _TextKind, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        if not self._is_open or self._kind is not kind:
            yield from self._open(kind)
        part = self.items[-1][kind.parts][0]
        part["text"] += text
        fields = {}
        if kind.has_logprobs:
            part["logprobs"] += logprobs
            fields = {"logprobs": list(logprobs)}
        yield self._event(f"{kind.text_event}.delta", **kind.index, delta=text, **fields)

    def _open(self, kind: _TextKind) -> Iterator[Event]:
        yield from self.close("completed")
        self._kind = kind
        yield from self._add({"id": new_id(kind.prefix), **kind.item, kind.parts: []})
        part = {**kind.part, "logprobs": []} if kind.has_logprobs else dict(kind.part)
        self.items[-1][kind.parts].append(part)
        yield self._event(f"{kind.part_event}.added", **kind.index, part=_copy(part))

    def _open_call(self, index: int) -> Iterator[Event]:
        self._kind = None
        call = self._reply.tool_calls[index]
        item = {"id": new_id("fc"), "type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""}
        yield from self._add(item)

    def _add(self, item: dict[str, Any]) -> Iterator[Event]:
        item["status"] = "in_progress"
        self.items.append(item)
        self._is_open = True
        yield self._item_event("response.output_item.added")

    def _item_event(self, kind: str) -> Event:
        return {"type": kind, "output_index": len(self.items) - 1, "item": _copy(self.items[-1])}

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item or a part as it is now: its lists and the parts in them still grow."""
    return {
        name: [_copy(part) for part in value] if isinstance(value, list) and name != "bytes" else value
        for name, value in item.items()
    }


def new_id(prefix: str) -> str:
    """Return a random id such as msg_0123456789abcdef01234567."""
    return f"{prefix}_{secrets.token_hex(12)}"
