"""The reply to a request of the Messages API: one message, or its events."""

import secrets
from collections.abc import AsyncIterator
from typing import Any

from openmimo.engine.server.anthropic.blocks import ContentBlocks, Event
from openmimo.engine.server.anthropic.errors import anthropic_error
from openmimo.engine.server.chat.task import PreparedChat, chat_deltas
from openmimo.engine.server.http.errors import ApiError
from openmimo.engine.server.http.service import Generation, Service
from openmimo.engine.server.http.streaming import event


class MessageAnswer:
    """The reply to one request, which `generation` produces.

    Attributes:
        reply: The reply so far.
    """

    def __init__(self, service: Service, prepared: PreparedChat, generation: Generation):
        self.generation = generation
        self._params = prepared.requests[0].params
        self._num_prompt_tokens = len(prepared.prompt.token_ids)
        (self.reply,) = prepared.new_replies(service.backend.tokenizer)
        self._content = ContentBlocks(self.reply)
        self._envelope = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": service.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        async for _ in self._content_events():
            pass
        return {**self._envelope, "content": self._content.blocks, **self._stop(), "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the events, from message_start to message_stop. An error is the last event."""
        try:
            async for one in self._events():
                yield event(one, one["type"])
        except ApiError as error:
            yield event(anthropic_error(error.status, error.message), "error")

    async def _events(self) -> AsyncIterator[Event]:
        start: Event = {
            **self._envelope,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }
        yield {"type": "message_start", "message": start}
        yield {"type": "ping"}
        async for one in self._content_events():
            yield one
        yield {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        yield {"type": "message_stop"}

    async def _content_events(self) -> AsyncIterator[Event]:
        async for _, _, parts in chat_deltas(self.generation, [self.reply]):
            for part in parts:
                for one in self._content.push(part):
                    yield one
        for one in self._content.close():
            yield one

    def _stop(self) -> dict[str, Any]:
        reply = self.reply
        if reply.finish_reason == "length" and len(reply.token_ids) < self._params.max_tokens:
            reason = "model_context_window_exceeded"
        elif reply.finish_reason in ("length", "repetition"):
            reason = "max_tokens"
        elif reply.stop_string:
            return {"stop_reason": "stop_sequence", "stop_sequence": reply.stop_string}
        else:
            reason = "tool_use" if reply.tool_calls and not reply.has_open_call else "end_turn"
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        num_cached = self.reply.num_cached_tokens
        return {
            "input_tokens": self._num_prompt_tokens - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": len(self.reply.token_ids),
            "output_tokens_details": {"thinking_tokens": self.reply.num_reasoning_tokens},
        }
