"""Server-sent events: replies and their errors as streams."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from openmimo.engine.server.http.bodies import unless_disconnected
from openmimo.engine.server.http.errors import ApiError, ClientGoneError
from openmimo.engine.server.http.service import Generation

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The reply, or its events if stream is true.", "content": {"text/event-stream": {}}}
}
DONE = b"data: [DONE]\n\n"
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\u0085\u2028\u2029"}
_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """Encode one event. Events of some APIs have a name."""
    return (f"event: {name}\n" if name else "").encode() + f"data: {json_text(data)}\n\n".encode()


def json_text(data: dict[str, Any]) -> str:
    """Encode an object as JSON in one line."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_LINE_ENDS)  # some clients treat these characters as line ends


class Answer(Protocol):
    """The replies to one request, which `generation` produces."""

    generation: Generation

    async def whole(self) -> dict[str, Any]:
        """Return the complete answer as one object."""


async def respond(request: Request, answer: Answer, events: AsyncIterator[bytes] | None) -> Response:
    """Send an answer as a stream of `events`, or as one object if that is None. Closes the generation at the end."""
    if events is not None:
        return EventStream(events, answer.generation)
    try:
        return JSONResponse(await unless_disconnected(request.receive, answer.whole()))
    finally:
        await answer.generation.close()


class PieceStream(Response):
    """Send pieces of a body as they arrive, and close `generation` when they end or the client disconnects.

    After an ApiError the connection is closed without the end of the body, which clients report as an error.
    """

    def __init__(self, pieces: AsyncIterator[bytes], generation: Generation, headers: Mapping[str, str]):
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._pieces = pieces
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_all(send))
        except ClientGoneError:
            pass
        finally:
            await self._generation.close()

    def error_piece(self, error: ApiError) -> bytes | None:
        """Return a last piece that tells the client about an error, or None if the format has none."""
        return None

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for part in self._pieces:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except ApiError as error:
            piece = self.error_piece(error)
            if piece is None:
                return  # the web server closes the connection
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class EventStream(PieceStream):
    """Send events. An ApiError becomes a final event in OpenAI's format, which OpenAI's clients raise."""

    def __init__(self, events: AsyncIterator[bytes], generation: Generation):
        super().__init__(events, generation, _HEADERS)

    def error_piece(self, error: ApiError) -> bytes | None:
        """The error as an event."""
        return event(error.body())
