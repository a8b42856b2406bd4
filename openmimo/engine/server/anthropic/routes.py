"""POST /v1/messages and /v1/messages/count_tokens."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from openmimo.core.records import SamplingParams
from openmimo.engine.server.anthropic.answer import MessageAnswer
from openmimo.engine.server.anthropic.errors import NO_THREADS, MessageErrorBody
from openmimo.engine.server.anthropic.schema import MessagesRequest, PromptRequest
from openmimo.engine.server.anthropic.task import message_task, prompt_task, skipped_parts
from openmimo.engine.server.chat.task import encode_task, prepare_chat
from openmimo.engine.server.http.bodies import JsonRoute, unless_disconnected
from openmimo.engine.server.http.errors import invalid
from openmimo.engine.server.http.service import Service
from openmimo.engine.server.http.streaming import STREAMED, respond
from openmimo.engine.server.http.warnings import skipped, warn


def message_routes(service: Service) -> APIRouter:
    """The endpoints of Anthropic's Messages API of a service."""
    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": MessageErrorBody}, "5XX": {"model": MessageErrorBody}}
    router = APIRouter(route_class=JsonRoute, responses=errors)

    @router.post("/v1/messages", responses=STREAMED)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Generates the next turn of a conversation, in Anthropic's format."""
        service.check_model(body.model)
        _check_thread(body)
        max_tokens = service.config.max_tokens
        is_large = request.state.is_large or body.form is not None
        work = service.prepared(
            lambda: prepare_chat(service, message_task(body, max_tokens=max_tokens)), is_large=is_large
        )
        prepared = await unless_disconnected(request.receive, work)
        answer = MessageAnswer(service, prepared, service.start(prepared.requests))
        response = await respond(request, answer, answer.events() if body.stream else None)
        return warn(response, skipped(skipped_parts(body)) + prepared.warnings([answer.reply]))

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: PromptRequest, request: Request) -> Response:
        """Counts the tokens of a request's prompt."""
        service.check_model(body.model)
        work = service.prepared(
            lambda: encode_task(service, prompt_task(body, SamplingParams())), is_large=request.state.is_large
        )
        prompt = await unless_disconnected(request.receive, work)
        return JSONResponse({"input_tokens": len(prompt.token_ids)})

    return router


def _check_thread(body: MessagesRequest) -> None:
    if body.thread is not None:
        message = "This server holds no threads; send the whole conversation without thread."
        raise invalid(message, "thread", code=NO_THREADS)
