"""POST /v1/responses."""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from openmimo.core.records import Request as EngineRequest
from openmimo.core.records import Structure
from openmimo.engine.server.http.bodies import JsonRoute, unless_disconnected
from openmimo.engine.server.http.errors import ApiError
from openmimo.engine.server.http.service import Generation, Service
from openmimo.engine.server.http.streaming import STREAMED, event, respond
from openmimo.engine.server.openai.chat import ChatPrompt, ChatReply, chat_prompt, template_options
from openmimo.engine.server.openai.response_items import Event, OutputItems, input_messages
from openmimo.engine.server.openai.sampling import (
    engine_requests,
    sampling_params,
    structure_field,
    structure_of,
    token_limit,
)
from openmimo.engine.server.openai.schema import JsonSchemaFormat, ResponseFormat
from openmimo.engine.server.openai.schema_responses import ResponseRequest, ResponseTool
from openmimo.engine.server.openai.tools import ToolPolicy, check_structure_alone, tool_policy


def response_routes(service: Service) -> APIRouter:
    """The endpoint /v1/responses of a service."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/responses", responses=STREAMED)
    async def responses(body: ResponseRequest, request: Request) -> Response:
        """Generates the next output items of a conversation."""
        service.check_model(body.model)
        has_structure = body.structured_outputs is not None or body.text is not None
        is_large = request.state.is_large or has_structure
        work = service.prepared(lambda: _prepare(service, body), is_large=is_large)
        prompt, requests = await unless_disconnected(request.receive, work)
        answer = _ResponseAnswer(service, body, prompt, service.start(requests))
        return await respond(request, answer, answer.stream() if body.stream else None)

    return router


def _prepare(service: Service, body: ResponseRequest) -> tuple[ChatPrompt, list[EngineRequest]]:
    """Convert a body to its prompt and one checked engine request. Runs in a worker thread."""
    policy = _tool_policy(body)
    effort = body.reasoning.effort if body.reasoning else None
    options = template_options(body.chat_template_kwargs, effort, "reasoning.effort")
    structure = _structure(body)
    if structure is not None:
        check_structure_alone(policy, thinks=bool(options.enable_thinking), param="text.format")
    tokenizer, positions = service.backend.tokenizer, service.backend.max_positions
    prompt = chat_prompt(tokenizer, input_messages(body), policy, options, most_tokens=positions, param="input")
    room = max(positions - len(prompt.token_ids), 1)
    limit = token_limit(body.max_output_tokens, room, service.config.max_tokens)
    params = sampling_params(body, max_tokens=limit, structure=structure or policy.structure)
    requests = engine_requests([prompt.token_ids], params, body, num_choices=1)
    structure_param = "tools" if structure is None else structure_field(body, "text.format")
    service.check(requests, param="input", structure_param=structure_param)
    return prompt, requests


def _structure(body: ResponseRequest) -> Structure | None:
    text_format = body.text.format if body.text else None
    if text_format is None:
        return structure_of(body)
    schema = None if text_format.json_schema is None else JsonSchemaFormat(schema=text_format.json_schema)
    return structure_of(body, ResponseFormat(type=text_format.type, json_schema=schema))


def _tool_policy(body: ResponseRequest) -> ToolPolicy:
    fields = {"name", "description", "parameters"}
    tools = [
        {"type": "function", "function": tool.model_dump(exclude_none=True, include=fields)}
        for tool in body.tools or []
    ]
    choice = body.tool_choice or "auto"
    if isinstance(choice, str):
        return tool_policy(tools, mode=choice, function=None, parallel=body.parallel_tool_calls)
    return tool_policy(tools, mode="function", function=choice.name, parallel=body.parallel_tool_calls)


class _ResponseAnswer:
    """The reply to one request, as one object or as a stream of events."""

    def __init__(
        self,
        service: Service,
        body: ResponseRequest,
        prompt: ChatPrompt,
        generation: Generation,
    ):
        self.generation = generation
        self._prompt = prompt
        self._reply = ChatReply(service.backend.tokenizer, prompt)
        self._output = OutputItems(self._reply)
        self._response = _new_response(service, body)
        self._num_events = 0

    async def whole(self) -> dict[str, Any]:
        async for _ in self._events():
            pass
        return self._response

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the events. The last is response.completed, response.incomplete or response.failed."""
        yield self._encoded({"type": "response.created", "response": self._response})
        yield self._encoded({"type": "response.in_progress", "response": self._response})
        try:
            async for item_event in self._events():
                yield self._encoded(item_event)
        except ApiError as error:
            self._response |= {
                "status": "failed",
                "error": {"code": "server_error", "message": error.message},
                "output": self._output.items,
            }
            yield self._encoded({"type": "response.failed", "response": self._response})
            raise

    async def _events(self) -> AsyncIterator[Event]:
        async for _, delta in self.generation.deltas():
            for part in self._reply.push(delta):
                for item_event in self._output.push(part):
                    yield item_event
            if self._reply.is_complete:
                self.generation.abort(0)
        for item_event in self._finish():
            yield item_event

    def _finish(self) -> Iterator[Event]:
        is_cut = self._reply.openai_finish_reason == "length"
        is_whole = not is_cut and not self._reply.has_open_call
        status = "completed" if is_whole else "incomplete"
        yield from self._output.close("incomplete" if is_cut else "completed")
        self._response |= {
            "status": status,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens" if is_cut else "stop"},
            "completed_at": int(time.time()),
            "output": self._output.items,
            "usage": self._usage(),
        }
        yield {"type": f"response.{status}", "response": self._response}

    def _usage(self) -> dict[str, Any]:
        num_input, num_output = len(self._prompt.token_ids), len(self._reply.token_ids)
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": self._reply.num_cached_tokens},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": self._reply.num_reasoning_tokens},
            "total_tokens": num_input + num_output,
        }

    def _encoded(self, item_event: Event) -> bytes:
        numbered = {**item_event, "sequence_number": self._num_events}
        self._num_events += 1
        return event(numbered, item_event["type"])


def _new_response(service: Service, body: ResponseRequest) -> dict[str, Any]:
    """Return the response object of a reply without output. Like OpenAI's, it repeats the request's settings."""
    choice = body.tool_choice or "auto"
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "model": service.model_name,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": body.reasoning.model_dump() if body.reasoning else {"effort": None, "summary": None},
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": _format_dict(body)},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [_tool_dict(tool) for tool in body.tools or []],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _format_dict(body: ResponseRequest) -> dict[str, Any]:
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return body.text.format.model_dump(by_alias=True, exclude_none=True)


def _tool_dict(tool: ResponseTool) -> dict[str, Any]:
    return {"strict": None, "parameters": None, **tool.model_dump(exclude_none=True)}
