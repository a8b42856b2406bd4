"""POST /v1/completions."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from openmimo.core.records import Delta, SamplingParams, TokenLogprob
from openmimo.core.records import Request as EngineRequest
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.server.chat.prompts import encode_prompts, listed_prompts
from openmimo.engine.server.chat.requests import engine_requests
from openmimo.engine.server.http.bodies import JsonRoute, unless_disconnected
from openmimo.engine.server.http.errors import invalid
from openmimo.engine.server.http.service import Generation, Service
from openmimo.engine.server.http.streaming import DONE, STREAMED, event, respond
from openmimo.engine.server.openai.sampling import sampling_params, structure_of, token_limit
from openmimo.engine.server.openai.schema import CompletionRequest, StreamOptions
from openmimo.engine.server.openai.tokens import CompletionLogprobs, TokenDetails, prompt_entries, usage

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


def completion_routes(service: Service) -> APIRouter:
    """The endpoint /v1/completions of a service."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions", responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continues one or more texts."""
        service.check_model(body.model)
        _check_options(body)
        is_large = request.state.is_large or body.structured_outputs is not None
        work = service.prepared(lambda: _requests(service, body), is_large=is_large)
        requests = await unless_disconnected(request.receive, work)
        answer = _CompletionAnswer(service, body, requests, service.start(requests))
        return await respond(request, answer, answer.events() if body.stream else None)

    return router


def _check_options(body: CompletionRequest) -> None:
    if body.stream_options and not body.stream:
        raise invalid("stream_options requires stream: true.", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs requires stream: false.", "prompt_logprobs")
    if body.best_of not in (None, body.n or 1):
        raise invalid("best_of must equal n: this server does not rank replies.", "best_of")


def _requests(service: Service, body: CompletionRequest) -> list[EngineRequest]:
    """Convert a body to checked engine requests. Runs in a worker thread."""
    num_choices = body.n or 1
    params = _params(service, body)
    prompts = listed_prompts(body.prompt)
    service.check_num_replies(len(prompts), num_choices)
    tokenizer, most = service.backend.tokenizer, service.backend.max_positions
    ids = encode_prompts(tokenizer, prompts, most_tokens=most, param="prompt", allow_special=bool(body.parse_special))
    requests = engine_requests(ids, params, num_choices=num_choices, priority=body.priority or 0, session=body.session)
    service.check(requests, param="prompt", structure_param="structured_outputs")
    return requests


def _params(service: Service, body: CompletionRequest) -> SamplingParams:
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens is 0, so there is nothing to generate; 0 is allowed only with echo.", "max_tokens")
    scored = [body.logprobs if body.echo else None, body.prompt_logprobs]
    limit = token_limit(body.max_tokens, _DEFAULT_MAX_TOKENS, service.config.max_tokens)
    return sampling_params(
        body,
        max_tokens=max(limit, 1),  # the engine generates at least one token; if the limit is 0, it is dropped
        structure=structure_of(body),
        logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs or 0,
        prompt_logprobs=max((number for number in scored if number is not None), default=None),
        skip_special_tokens=True,
    )


class _Continuation:
    """One choice, built from its deltas."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: tuple[int, ...], body: CompletionRequest):
        self.prompt_token_ids = prompt_token_ids
        self.token_ids: list[int] = []
        self.finish_reason = ""
        self.num_cached_tokens = 0
        self.num_drafted_tokens = 0
        self._tokenizer = tokenizer
        self._echo = bool(body.echo)
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._only_prompt = body.max_tokens == 0
        self._logprobs: CompletionLogprobs | None = None
        if body.logprobs is not None:
            skip_special = body.skip_special_tokens is not False
            self._logprobs = CompletionLogprobs(tokenizer, body.logprobs, skip_special=skip_special)

    def push(self, delta: Delta) -> dict[str, Any]:
        """Add a delta. Returns its text and, if requested, its log-probabilities, as fields of a choice."""
        text = "" if self._only_prompt else delta.text
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        parts = []
        if self._echo:
            self._echo = False
            text = self._tokenizer.decode(self.prompt_token_ids, skip_special=False) + text
            if self._logprobs is not None:
                parts.append(self._logprobs.prompt_entries(self.prompt_token_ids, delta.prompt_logprobs))
        if self._logprobs is not None and not self._only_prompt:
            parts.append(self._logprobs.entries(delta.logprobs))
        if not self._only_prompt:
            self.token_ids += delta.token_ids
            self.num_drafted_tokens += sum(delta.drafted)
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        reason = "length" if delta.finish_reason and self._only_prompt else delta.finish_reason
        self.finish_reason = "length" if reason == "repetition" else reason
        return {"text": text, "logprobs": _joined(parts)}


class _CompletionAnswer:
    """The replies to one completion request, as one object or as a stream of chunks."""

    def __init__(
        self, service: Service, body: CompletionRequest, requests: list[EngineRequest], generation: Generation
    ):
        self.generation = generation
        self._tokenizer = service.backend.tokenizer
        self._body = body
        self._replies = [_Continuation(self._tokenizer, request.prompt_token_ids, body) for request in requests]
        self._envelope = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        parts: list[list[dict[str, Any]]] = [[] for _ in self._replies]
        async for index, delta in self.generation.deltas():
            parts[index].append(self._replies[index].push(delta))
        choices = []
        for index, reply in enumerate(self._replies):
            choice = {
                "index": index,
                "text": "".join(part["text"] for part in parts[index]),
                "logprobs": _joined([part["logprobs"] for part in parts[index] if part["logprobs"]]),
                "finish_reason": reply.finish_reason,
            }
            if self._body.return_token_ids:
                choice |= {"token_ids": reply.token_ids, "prompt_token_ids": list(reply.prompt_token_ids)}
            if self._body.prompt_logprobs is not None:
                entries = reply.prompt_logprobs
                choice["prompt_logprobs"] = prompt_entries(self._tokenizer, entries, self._body.prompt_logprobs)
            choices.append(choice)
        return {**self._envelope, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the chunks, and the usage if requested."""
        options = self._body.stream_options or StreamOptions()
        details = [TokenDetails(self._tokenizer) for _ in self._replies]
        started: set[int] = set()
        async for index, delta in self.generation.deltas():
            reply = self._replies[index]
            choice = {"index": index, **reply.push(delta), "finish_reason": delta.finish_reason or None}
            if delta.finish_reason:
                choice["finish_reason"] = reply.finish_reason
            if options.token_details:
                choice["token_details"] = details[index].entries(delta)
            if self._body.return_token_ids:
                choice["token_ids"] = list(delta.token_ids)
                if index not in started:
                    choice["prompt_token_ids"] = list(reply.prompt_token_ids)
            started.add(index)
            counts = {"usage": self._usage()} if options.continuous_usage_stats else {}
            yield event({**self._envelope, "choices": [choice], **counts})
        if options.include_usage:
            yield event({**self._envelope, "choices": [], "usage": self._usage()})
        yield DONE

    def _usage(self) -> dict[str, Any]:
        first_choices = self._replies[:: self._body.n or 1]  # the choices of a prompt count it once
        return usage(
            num_prompt_tokens=sum(len(reply.prompt_token_ids) for reply in first_choices),
            num_new_tokens=sum(len(reply.token_ids) for reply in self._replies),
            num_cached_tokens=sum(reply.num_cached_tokens for reply in first_choices),
            num_reasoning_tokens=0,
            num_drafted_tokens=sum(reply.num_drafted_tokens for reply in self._replies),
        )


def _joined(parts: list[dict[str, list[Any]]]) -> dict[str, list[Any]] | None:
    if not parts:
        return None
    return {column: [entry for part in parts for entry in part[column]] for column in parts[0]}
