"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from openmimo.core.records import TokenLogprob
from openmimo.data.chat.parser import ChatEvent, ContentText, ReasoningText, ToolCallArguments, ToolCallStart
from openmimo.engine.server.chat.prompts import prompt_ending
from openmimo.engine.server.chat.task import ChatTask, FieldNames, PreparedChat, chat_deltas, prepare_chat
from openmimo.engine.server.chat.tools import ToolPolicy, selected_tools, tool_policy
from openmimo.engine.server.chat.turns import ChatReply
from openmimo.engine.server.http.bodies import JsonRoute, unless_disconnected
from openmimo.engine.server.http.errors import invalid
from openmimo.engine.server.http.service import Generation, Service
from openmimo.engine.server.http.streaming import DONE, STREAMED, event, respond
from openmimo.engine.server.http.warnings import warn
from openmimo.engine.server.openai.audio.chat import answer_chat, field_with_audio
from openmimo.engine.server.openai.audio.store import SpeechStore
from openmimo.engine.server.openai.conversation import template_messages, template_options
from openmimo.engine.server.openai.sampling import chat_token_limit, sampling_params, structure_field, structure_of
from openmimo.engine.server.openai.schema import AllowedToolsChoice, ChatRequest, StreamOptions
from openmimo.engine.server.openai.tokens import TokenDetails, chat_logprobs, prompt_entries, usage


def chat_routes(service: Service) -> APIRouter:
    """The endpoint /v1/chat/completions of a service."""
    router = APIRouter(route_class=JsonRoute)
    store = SpeechStore()

    @router.post("/v1/chat/completions", responses=STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Generates the next turn of a conversation."""
        service.check_model(body.model)
        _check_options(body)
        if (audio_field := field_with_audio(body)) is not None:
            return await answer_chat(service, store, body, request, audio_field)
        has_structure = body.structured_outputs is not None or body.response_format is not None
        is_large = request.state.is_large or has_structure
        work = service.prepared(lambda: prepare_chat(service, _task(service, body)), is_large=is_large)
        prepared = await unless_disconnected(request.receive, work)
        answer = _ChatAnswer(service, body, prepared, service.start(prepared.requests))
        response = await respond(request, answer, answer.events() if body.stream else None)
        return warn(response, prepared.warnings(answer.replies))

    return router


def _check_options(body: ChatRequest) -> None:
    if body.stream_options and not body.stream:
        raise invalid("stream_options requires stream: true.", "stream_options")
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs requires logprobs: true.", "top_logprobs")
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs requires stream: false.", "prompt_logprobs")


def _task(service: Service, body: ChatRequest) -> ChatTask:
    params = sampling_params(
        body,
        max_tokens=chat_token_limit(body, service.config.max_tokens),
        structure=structure_of(body, body.response_format),
        logprobs=bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
        prompt_logprobs=body.prompt_logprobs,
    )
    ending = prompt_ending(
        add_generation_prompt=body.add_generation_prompt, continue_final_message=body.continue_final_message
    )
    return ChatTask(
        messages=template_messages(body.messages),
        params=params,
        num_choices=body.n or 1,
        policy=_tool_policy(body),
        options=template_options(body.chat_template_kwargs, body.reasoning_effort, "reasoning_effort"),
        ending=ending,
        priority=body.priority or 0,
        session=body.session,
        names=FieldNames(structure=structure_field(body, "response_format")),
    )


def _tool_policy(body: ChatRequest) -> ToolPolicy:
    tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools or []]
    choice = body.tool_choice or "auto"
    if isinstance(choice, AllowedToolsChoice):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        tools = selected_tools(tools, names, "tool_choice.allowed_tools.tools")
        choice = choice.allowed_tools.mode
    if isinstance(choice, str):
        return tool_policy(tools, mode=choice, function=None, parallel=body.parallel_tool_calls)
    return tool_policy(tools, mode="function", function=choice.function.name, parallel=body.parallel_tool_calls)


class _ChatAnswer:
    """The replies to one chat request, as one object or as a stream of chunks.

    Attributes:
        replies: The replies so far, one for each choice.
    """

    def __init__(self, service: Service, body: ChatRequest, prepared: PreparedChat, generation: Generation):
        self.generation = generation
        self._tokenizer = service.backend.tokenizer
        self._body = body
        self._prompt = prepared.prompt
        self.replies = prepared.new_replies(self._tokenizer)
        self._envelope = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        logprobs: list[list[dict[str, Any]]] = [[] for _ in self.replies]
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        async for index, delta, _ in chat_deltas(self.generation, self.replies):
            prompt_logprobs = prompt_logprobs or delta.prompt_logprobs
            if delta.logprobs:
                logprobs[index] += chat_logprobs(self._tokenizer, delta.logprobs)["content"]
        choices = []
        for index, reply in enumerate(self.replies):
            choice: dict[str, Any] = {
                "index": index,
                "message": reply.message(),
                "logprobs": {"content": logprobs[index], "refusal": None} if self._body.logprobs else None,
                "finish_reason": reply.openai_finish_reason,
            }
            if self._body.return_token_ids:
                choice["token_ids"] = reply.token_ids
            choices.append(choice)
        answer = {**self._envelope, "object": "chat.completion", "choices": choices, "usage": self._usage()}
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = list(self._prompt.token_ids)
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_entries(self._tokenizer, prompt_logprobs, self._body.prompt_logprobs)
        return answer

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the chunks: each choice's role, its deltas and its finish reason; then the usage if requested."""
        options = self._body.stream_options or StreamOptions()
        details = [TokenDetails(self._tokenizer) for _ in self.replies]
        for index in range(len(self.replies)):
            yield self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        async for index, delta, events in chat_deltas(self.generation, self.replies):
            reply = self.replies[index]
            choice: dict[str, Any] = {"index": index, "delta": _delta(events, reply), "finish_reason": None}
            if delta.logprobs:
                choice["logprobs"] = chat_logprobs(self._tokenizer, delta.logprobs)
            if options.token_details and delta.token_ids:
                choice["token_details"] = details[index].entries(delta)
            if self._body.return_token_ids and delta.token_ids:
                choice["token_ids"] = list(delta.token_ids)
            if choice["delta"] or len(choice) > 3:
                yield self._chunk(choice)
            if reply.finish_reason:
                yield self._chunk({"index": index, "delta": {}, "finish_reason": reply.openai_finish_reason})
        if options.include_usage:
            yield event({**self._envelope, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()})
        yield DONE

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        chunk = {**self._envelope, "object": "chat.completion.chunk", "choices": [choice]}
        if self._body.stream_options and self._body.stream_options.continuous_usage_stats:
            chunk["usage"] = self._usage()
        return event(chunk)

    def _usage(self) -> dict[str, Any]:
        return usage(
            num_prompt_tokens=len(self._prompt.token_ids),
            num_new_tokens=sum(len(reply.token_ids) for reply in self.replies),
            num_cached_tokens=max(reply.num_cached_tokens for reply in self.replies),
            num_reasoning_tokens=sum(reply.num_reasoning_tokens for reply in self.replies),
            num_drafted_tokens=sum(reply.num_drafted_tokens for reply in self.replies),
        )


def _delta(events: list[ChatEvent], reply: ChatReply) -> dict[str, Any]:
    """Return the delta object of a chunk."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for part in events:
        match part:
            case ReasoningText():
                delta["reasoning_content"] = delta.get("reasoning_content", "") + part.text
            case ContentText():
                delta["content"] = delta.get("content", "") + part.text
            case ToolCallStart():
                function = {"name": part.name, "arguments": ""}
                call_id = reply.tool_calls[part.index].id
                calls[part.index] = {"index": part.index, "id": call_id, "type": "function", "function": function}
            case ToolCallArguments():
                call = calls.setdefault(part.index, {"index": part.index, "function": {"arguments": ""}})
                call["function"]["arguments"] += part.text
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta
