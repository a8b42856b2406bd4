"""The Responses API over a WebSocket: each message of the client creates one response, one after the other."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from openmimo.engine.server.http import limits
from openmimo.engine.server.http.bodies import read_body
from openmimo.engine.server.http.errors import ApiError
from openmimo.engine.server.http.service import Service
from openmimo.engine.server.http.streaming import json_text
from openmimo.engine.server.openai.responses.answer import ResponseAnswer
from openmimo.engine.server.openai.responses.schema import ResponseCreateEvent
from openmimo.engine.server.openai.responses.store import ResponseStore
from openmimo.engine.server.openai.responses.task import conversation_of, has_structure, prepare_response, shortest

_CONNECTION_SECONDS = 3600.0


def serve_socket(service: Service, store: ResponseStore) -> Callable[[WebSocket], Awaitable[None]]:
    """Return the endpoint for WebSocket connections."""

    async def serve(websocket: WebSocket) -> None:
        await websocket.accept()
        connection = _Connection(service, store, websocket)
        try:
            await _run(connection, websocket)
        except WebSocketDisconnect:  # while an event was sent
            pass
        finally:
            store.forget(connection)

    return serve


async def _run(connection: "_Connection", websocket: WebSocket) -> None:
    try:
        async with asyncio.timeout(_CONNECTION_SECONDS):
            await connection.run()
    except TimeoutError:
        message = f"The connection has reached its limit of {_CONNECTION_SECONDS:g} s; open a new one."
        await connection.send_error(ApiError(400, message, code="websocket_connection_limit_reached"))
        await websocket.close()


class _Connection:
    """One connection. The store keeps its last response for it, unless a request that continues it fails."""

    def __init__(self, service: Service, store: ResponseStore, websocket: WebSocket):
        self._service = service
        self._store = store
        self._websocket = websocket
        self._messages: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)

    async def run(self) -> None:
        """Answer messages until the client disconnects."""
        tasks = asyncio.create_task(self._read()), asyncio.create_task(self._answer_all())
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def send_error(self, error: ApiError) -> None:
        """Send an error, which ends the turn and not the connection."""
        details = error.body()["error"]
        details["code"] = details["code"] or details["type"]
        await self._send({"type": "error", "status": error.status, "error": details})

    async def _read(self) -> None:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            await self._messages.put(message.get("bytes") or (message.get("text") or "").encode())

    async def _answer_all(self) -> None:
        while True:
            await self._answer(await self._messages.get())

    async def _answer(self, content: bytes) -> None:
        """Answer one message. An error drops the connection's last response, as Open Responses demands."""
        with self._service.open_bytes.body() as size:
            try:
                size.grow(len(content))
                answer = await self._start(content)
            except ApiError as error:
                self._store.forget(self)
                await self.send_error(error)
                return
            try:
                async for one in answer.events():
                    await self._send(one)
            except ApiError:  # the event response.failed has reported it
                self._store.forget(self)
            finally:
                await answer.generation.close()

    async def _start(self, content: bytes) -> ResponseAnswer:
        service = self._service
        most_values = max(limits.VALUES, 2 * service.backend.max_positions)
        is_large = len(content) > limits.LARGE_BODY_BYTES
        read = functools.partial(read_body, content, ResponseCreateEvent, most_values, strict=service.config.strict)
        body, ignored = await service.prepared(read, is_large=is_large)
        service.metrics.count_ignored_fields(ignored)
        service.check_model(body.model)
        conversation = conversation_of(
            self._store, self, previous_response_id=body.previous_response_id, given=body.input
        )
        is_large = is_large or has_structure(body) or conversation.previous is not None
        work = functools.partial(prepare_response, service, body, conversation, num_bytes=len(content))
        prepared = await service.prepared(work, is_large=is_large)
        has_output = body.generate is not False
        requests = prepared.chat.requests
        generation = service.start(requests if has_output else [shortest(request) for request in requests])
        return ResponseAnswer(service, self._store, body, prepared, generation, owner=self, has_output=has_output)

    async def _send(self, one: dict[str, Any]) -> None:
        await self._websocket.send_text(json_text(one))
