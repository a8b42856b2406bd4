"""The endpoints of the Responses API."""

import functools
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from openmimo.engine.server.chat.task import encode_task
from openmimo.engine.server.http.bodies import JsonRoute, unless_disconnected
from openmimo.engine.server.http.errors import ApiError, invalid
from openmimo.engine.server.http.service import Service
from openmimo.engine.server.http.streaming import STREAMED, respond
from openmimo.engine.server.http.warnings import skipped, warn
from openmimo.engine.server.openai.responses.answer import ResponseAnswer
from openmimo.engine.server.openai.responses.compaction import CompactionAnswer, prepare_compaction
from openmimo.engine.server.openai.responses.schema import CompactRequest, ResponseRequest
from openmimo.engine.server.openai.responses.socket import serve_socket
from openmimo.engine.server.openai.responses.store import ResponseStore, StoredResponse
from openmimo.engine.server.openai.responses.task import (
    Conversation,
    conversation_of,
    has_structure,
    prepare_response,
    response_task,
    skipped_parts,
)


def response_routes(service: Service) -> APIRouter:
    """The endpoints under /v1/responses of a service. They share one store."""
    store = ResponseStore(service.config.response_store_bytes, service.config.response_store_seconds)
    router = APIRouter()
    router.include_router(_generating_routes(service, store))
    router.include_router(_stored_routes(store))
    router.add_api_websocket_route("/v1/responses", serve_socket(service, store))
    return router


def _generating_routes(service: Service, store: ResponseStore) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/responses", responses=STREAMED)
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        """Generates the next output items of a conversation."""
        service.check_model(body.model)
        conversation = conversation_of(store, None, previous_response_id=body.previous_response_id, given=body.input)
        is_large = request.state.is_large or has_structure(body) or conversation.previous is not None
        prepare = functools.partial(prepare_response, service, body, conversation, num_bytes=request.state.num_bytes)
        prepared = await unless_disconnected(request.receive, service.prepared(prepare, is_large=is_large))
        answer = ResponseAnswer(service, store, body, prepared, service.start(prepared.chat.requests))
        response = await respond(request, answer, answer.encoded_events() if body.stream else None)
        return warn(response, skipped(skipped_parts(body)) + prepared.chat.warnings([answer.reply]))

    @router.post("/v1/responses/compact")
    async def compact(body: CompactRequest, request: Request) -> Response:
        """Replaces a conversation by one item with the user's messages and a summary."""
        service.check_model(body.model)
        conversation = conversation_of(store, None, previous_response_id=body.previous_response_id, given=body.input)
        work = service.prepared(lambda: prepare_compaction(service, conversation, body.instructions), is_large=True)
        prepared = await unless_disconnected(request.receive, work)
        answer = CompactionAnswer(service, prepared, service.start(prepared.chat.requests))
        return await respond(request, answer, None)

    @router.post("/v1/responses/input_tokens")
    async def count_tokens(body: ResponseRequest, request: Request) -> Response:
        """Counts the tokens of a request's prompt."""
        service.check_model(body.model)
        conversation = conversation_of(store, None, previous_response_id=body.previous_response_id, given=body.input)
        work = service.prepared(lambda: _num_tokens(service, body, conversation), is_large=request.state.is_large)
        num_tokens = await unless_disconnected(request.receive, work)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": num_tokens})

    return router


def _num_tokens(service: Service, body: ResponseRequest, conversation: Conversation) -> int:
    task, _ = response_task(service, body, conversation)
    return len(encode_task(service, task).token_ids)


def _stored_routes(store: ResponseStore) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/responses/{response_id}")
    async def retrieve(response_id: str, stream: bool = False) -> dict[str, Any]:
        """Returns a stored response."""
        if stream:
            raise invalid("A stored response cannot be streamed; omit stream.", "stream")
        return _stored(store, response_id).response

    @router.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> dict[str, Any]:
        """Deletes a stored response."""
        if not store.delete(response_id):
            raise _not_found(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @router.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> dict[str, Any]:
        """Lists the input items of a stored response's request."""
        items = list(_stored(store, response_id).input_items)
        if order == "desc":
            items.reverse()
        start = next((index + 1 for index, item in enumerate(items) if item["id"] == after), 0)
        page = items[start : start + limit]
        return {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else "",
            "last_id": page[-1]["id"] if page else "",
            "has_more": start + limit < len(items),
        }

    return router


def _stored(store: ResponseStore, response_id: str) -> StoredResponse:
    stored = store.get(response_id)
    if stored is None:
        raise _not_found(response_id)
    return stored


def _not_found(response_id: str) -> ApiError:
    return ApiError(404, f"Response with id {response_id!r} not found.", param="response_id", code="not_found")
