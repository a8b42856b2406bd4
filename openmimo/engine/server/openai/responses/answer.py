"""The reply to a request of the Responses API: one response object, or its events."""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from openmimo.engine.server.chat.task import chat_deltas
from openmimo.engine.server.chat.turns import ChatReply
from openmimo.engine.server.http.errors import ApiError
from openmimo.engine.server.http.service import Generation, Service
from openmimo.engine.server.http.streaming import event
from openmimo.engine.server.openai.responses.input import as_input, num_characters
from openmimo.engine.server.openai.responses.logprobs import MessageLogprobs
from openmimo.engine.server.openai.responses.output import Event, OutputItems, ReasoningForm
from openmimo.engine.server.openai.responses.schema import ResponseRequest, ResponseTool
from openmimo.engine.server.openai.responses.store import ResponseStore, StoredResponse, estimated_bytes
from openmimo.engine.server.openai.responses.task import PreparedResponse, functions_of

_ENTRY_BYTES = 512  # about what one token's entry among log-probabilities takes in memory


class ResponseAnswer:
    """The reply to one request. When it is complete, it is stored.

    Args:
        service: The service.
        store: The stored responses.
        body: The request.
        prepared: The request's prompt and items.
        generation: The running reply.
        owner: The WebSocket connection of the request. It keeps a response that is not to be stored.
        has_output: Whether the response contains the reply. Otherwise the request only reads its prompt.

    Attributes:
        reply: The reply so far.
    """

    def __init__(
        self,
        service: Service,
        store: ResponseStore,
        body: ResponseRequest,
        prepared: PreparedResponse,
        generation: Generation,
        owner: object | None = None,
        *,
        has_output: bool = True,
    ):
        self.generation = generation
        self._store = store
        self._prepared = prepared
        self._owner = owner
        self._has_output = has_output
        (self.reply,) = prepared.chat.new_replies(service.backend.tokenizer)
        self._output = OutputItems(self.reply, _reasoning_form(body))
        self._logprobs = MessageLogprobs(service.backend.tokenizer)
        self._num_prompt_tokens = len(prepared.chat.prompt.token_ids)
        self._response = new_response(body, model=service.model_name)
        self._num_events = 0

    async def whole(self) -> dict[str, Any]:
        async for _ in self._item_events():
            pass
        return self._response

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events. The last is response.completed, response.incomplete or response.failed.

        Raises ApiError after response.failed.
        """
        yield self._numbered({"type": "response.created", "response": self._response})
        yield self._numbered({"type": "response.in_progress", "response": self._response})
        try:
            async for item_event in self._item_events():
                yield self._numbered(item_event)
        except ApiError as error:
            self._response |= {
                "status": "failed",
                "error": {"code": "server_error", "message": error.message},
                "output": self._output.items,
            }
            yield self._numbered({"type": "response.failed", "response": self._response})
            raise

    async def encoded_events(self) -> AsyncIterator[bytes]:
        """Yield the events as server-sent events. An error is the last of them."""
        try:
            async for one in self.events():
                yield event(one, one["type"])
        except ApiError as error:
            details = error.body()["error"]
            # OpenAI's clients read the fields at the top, Open Responses defines the field "error".
            yield event(self._numbered({**details, "type": "error", "error": details}), "error")

    async def _item_events(self) -> AsyncIterator[Event]:
        async for _, delta, parts in chat_deltas(self.generation, [self.reply]):
            self._logprobs.add(delta.logprobs)
            for part in parts if self._has_output else ():
                for item_event in self._output.push(part, self._logprobs.of(part)):
                    yield item_event
        for item_event in self._finish():
            yield item_event

    def _finish(self) -> Iterator[Event]:
        is_cut = self._has_output and self.reply.openai_finish_reason == "length"
        is_whole = not is_cut and not self.reply.has_open_call
        status = "completed" if is_whole else "incomplete"
        yield from self._output.close("incomplete" if is_cut else "completed")
        self._response |= {
            "status": status,
            # Clients' types have no reason for a call that the model or a stop string ended early.
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "completed_at": int(time.time()),
            "output": self._output.items,
            "usage": usage_of(self.reply, self._num_prompt_tokens),
        }
        self._keep()
        yield {"type": f"response.{status}", "response": self._response}

    def _keep(self) -> None:
        if self._response["store"]:
            self._store.put(self._stored())
        elif self._owner is not None:
            self._store.put(self._stored(), self._owner)

    def _stored(self) -> StoredResponse:
        prepared, output = self._prepared, as_input(self._output.items)
        size = num_characters(output)
        return StoredResponse(
            self._response,
            prepared.input_items,
            [*prepared.conversation.items, *output],
            prepared.num_characters + size,
            prepared.num_bytes + estimated_bytes(2 * size, len(output)) + self._logprob_bytes(),
        )

    def _logprob_bytes(self) -> int:
        params = self._prepared.chat.requests[0].params
        return len(self.reply.token_ids) * (1 + params.top_logprobs) * _ENTRY_BYTES if params.logprobs else 0

    def _numbered(self, one: Event) -> Event:
        self._num_events += 1
        return {**one, "sequence_number": self._num_events - 1}


def _reasoning_form(body: ResponseRequest) -> ReasoningForm:
    options = body.reasoning
    return ReasoningForm(
        is_summary=options is not None and (options.summary or options.generate_summary) is not None,
        is_sealed="reasoning.encrypted_content" in (body.include or ()),
    )


def usage_of(reply: ChatReply, num_prompt_tokens: int) -> dict[str, Any]:
    """Return the token counts of a reply."""
    num_output = len(reply.token_ids)
    return {
        "input_tokens": num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": reply.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": reply.num_reasoning_tokens},
        "total_tokens": num_prompt_tokens + num_output,
    }


def new_response(body: ResponseRequest, *, model: str) -> dict[str, Any]:
    """Return the response object of a reply without output. Like OpenAI's, it repeats the request's settings."""
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "model": model,
        "status": "in_progress",
        "background": False,
        "error": None,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": body.presence_penalty or 0.0,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": _reasoning_dict(body),
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": _format_dict(body)},
        "tool_choice": _choice_dict(body),
        "tools": [_tool_dict(tool) for tool in functions_of(body)],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


def _reasoning_dict(body: ResponseRequest) -> dict[str, Any]:
    reasoning = body.reasoning
    return {"effort": reasoning and reasoning.effort, "summary": reasoning and reasoning.summary}


def _format_dict(body: ResponseRequest) -> dict[str, Any]:
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return body.text.format.model_dump(by_alias=True, exclude_none=True)


def _choice_dict(body: ResponseRequest) -> str | dict[str, Any]:
    choice = body.tool_choice or "auto"
    return choice if isinstance(choice, str) else choice.model_dump(exclude_none=True)


def _tool_dict(tool: ResponseTool) -> dict[str, Any]:
    return {"description": None, "strict": None, "parameters": None, **tool.model_dump(exclude_none=True)}
