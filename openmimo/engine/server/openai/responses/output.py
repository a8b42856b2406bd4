"""The output items and events of a response, built from the events of a chat reply."""

import secrets
from collections.abc import Iterator
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


class OutputItems:
    """The output items of a response, built from the reply's events.

    Each method yields the events of the Responses API, without their sequence numbers.

    Args:
        reply: The reply whose events follow.
        seals_reasoning: Whether reasoning items also have the reasoning as `encrypted_content`.
    """

    def __init__(self, reply: ChatReply, *, seals_reasoning: bool = False):
        self.items: list[dict[str, Any]] = []
        self._reply = reply
        self._seals_reasoning = seals_reasoning
        self._is_open = False

    def push(self, part: ChatEvent) -> Iterator[Event]:
        """Add one part of the reply."""
        match part:
            case ReasoningText():
                yield from self._open("reasoning")
                self._part["text"] += part.text
                yield self._event("response.reasoning_text.delta", content_index=0, delta=part.text)
            case ContentText():
                yield from self._open("message")
                self._part["text"] += part.text
                yield self._event("response.output_text.delta", content_index=0, delta=part.text, logprobs=[])
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
            is_call = self.items[-1]["type"] == "function_call"
            yield from self._end("incomplete" if is_call else status)

    def _end(self, status: str) -> Iterator[Event]:
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            arguments = item["arguments"]
            yield self._event("response.function_call_arguments.done", arguments=arguments, name=item["name"])
        elif item["type"] == "reasoning":
            if self._seals_reasoning:
                item["encrypted_content"] = seal(self._part["text"])
            yield self._event("response.reasoning_text.done", content_index=0, text=self._part["text"])
        else:
            yield self._event("response.output_text.done", content_index=0, text=self._part["text"], logprobs=[])
        if item["type"] != "function_call":
            yield self._event("response.content_part.done", content_index=0, part=dict(self._part))
        yield self._item_event("response.output_item.done")

    @property
    def _part(self) -> dict[str, Any]:
        return self.items[-1]["content"][0]

    def _open(self, kind: str) -> Iterator[Event]:
        """Start a text item, unless the open item has the same kind."""
        if self._is_open and self.items[-1]["type"] == kind:
            return
        yield from self.close("completed")
        item: dict[str, Any]
        part: dict[str, Any]
        if kind == "reasoning":
            item = {"id": new_id("rs"), "type": kind, "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": new_id("msg"), "type": kind, "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield from self._add(item)
        item["content"].append(part)
        yield self._event("response.content_part.added", content_index=0, part=dict(part))

    def _open_call(self, index: int) -> Iterator[Event]:
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
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)


def new_id(prefix: str) -> str:
    """Return a random id such as msg_0123456789abcdef01234567."""
    return f"{prefix}_{secrets.token_hex(12)}"
