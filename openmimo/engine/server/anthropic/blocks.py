"""The content blocks of a message and their events, built from the events of a chat reply."""

import hashlib
from collections.abc import Iterator
from typing import Any

import pydantic_core

from openmimo.data.chat.parser import (
    ChatEvent,
    ContentText,
    ReasoningText,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from openmimo.engine.server.chat.turns import ChatReply

Event = dict[str, Any]


class ContentBlocks:
    """The content of a message. Each method yields the events of the Messages API.

    Attributes:
        blocks: The blocks in order. The last may be open.
    """

    def __init__(self, reply: ChatReply):
        self.blocks: list[dict[str, Any]] = []
        self._reply = reply
        self._is_open = False
        self._arguments = ""

    def push(self, part: ChatEvent) -> Iterator[Event]:
        """Add one part of the reply."""
        match part:
            case ReasoningText():
                yield from self._open({"type": "thinking", "thinking": "", "signature": ""})
                self.blocks[-1]["thinking"] += part.text
                yield self._delta("thinking_delta", thinking=part.text)
            case ContentText():
                yield from self._open({"type": "text", "text": ""})
                self.blocks[-1]["text"] += part.text
                yield self._delta("text_delta", text=part.text)
            case ToolCallStart():
                yield from self.close()
                call = self._reply.tool_calls[part.index]
                self._arguments = ""
                yield from self._open({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            case ToolCallArguments():
                self._arguments += part.text
                yield self._delta("input_json_delta", partial_json=part.text)
            case ToolCallEnd():
                yield from self.close()

    def close(self) -> Iterator[Event]:
        """End the open block, if any. The input of an incomplete call has the complete part of its arguments."""
        if not self._is_open:
            return
        self._is_open = False
        block = self.blocks[-1]
        if block["type"] == "thinking":
            block["signature"] = _signature(block["thinking"])
            yield self._delta("signature_delta", signature=block["signature"])
        elif block["type"] == "tool_use":
            block["input"] = _partial_object(self._arguments)
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _open(self, block: dict[str, Any]) -> Iterator[Event]:
        """Start a block, unless the open block has the same type."""
        if self._is_open and self.blocks[-1]["type"] == block["type"]:
            return
        yield from self.close()
        self._is_open = True
        self.blocks.append(block)
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _delta(self, kind: str, **fields: str) -> Event:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": {"type": kind, **fields}}


def _signature(thinking: str) -> str:
    """Clients demand a signature and return it. This one only identifies the text: the server does not check it."""
    return hashlib.sha256(thinking.encode()).hexdigest()


def _partial_object(text: str) -> dict[str, Any]:
    try:
        value = pydantic_core.from_json(text or "{}", allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
