"""ASGI middleware: request ids, HEAD requests, request counts, API keys and body sizes."""

import asyncio
import hmac
import re
import secrets
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openmimo.engine.server.http.errors import ApiError
from openmimo.engine.server.http.limits import REQUEST_ID_CHARACTERS
from openmimo.engine.server.http.open_bytes import OpenBody, OpenBytes

REQUESTS = ("http", "websocket")
_GUARDED = ("/v1/", "/tokenize", "/detokenize", "/tokenizer_info")
_REQUEST_ID = re.compile(rf"[!-~]{{1,{REQUEST_ID_CHARACTERS}}}")


class NameRequests:
    """Give every response the header X-Request-Id: the id of the request's own header, or a new one.

    The id is also in the request's state.

    HEAD requests are passed on as GET requests; the web server sends no body in response to HEAD.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"

        scope.setdefault("state", {})["request_id"] = request_id

        async def name_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, name_and_send)


class CountRequests:
    """Call `count(path, status)` for every response. Paths outside `paths` count as "other", so labels stay few."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None], paths: frozenset[str]):
        self._app = app
        self._count = count
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in REQUESTS:
            await self._app(scope, receive, send)
            return

        async def count_and_send(message: Message) -> None:
            status = 101 if message["type"] == "websocket.accept" else message.get("status")
            if status is not None:
                self._count(scope["path"] if scope["path"] in self._paths else "other", status)
            await send(message)

        await self._app(scope, receive, count_and_send)


class RequireKey:
    """Reject API requests without the key, which OpenAI's clients send in one header and Anthropic's in another."""

    def __init__(self, app: ASGIApp, api_key: str):
        self._app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in REQUESTS and scope["path"].startswith(_GUARDED) and not self._has_key(scope):
            error = ApiError(
                401,
                "The API key is missing or wrong; send it as Authorization: Bearer KEY, or as x-api-key: KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = (bearer.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b""))
        return any(hmac.compare_digest(key, self._key) for key in given)


class LimitBody:
    """Read the body before the route runs, and reject it as soon as it is too large, chunked or not.

    Args:
        app: The next ASGI app.
        max_bytes: Maximum size of one body.
        open_bytes: The bodies of all open requests.
        timeout_seconds: Time limit for a body to arrive.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, open_bytes: OpenBytes, timeout_seconds: float):
        self._app = app
        self._max_bytes = max_bytes
        self._open_bytes = open_bytes
        self._timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._open_bytes.body() as size:
            try:
                unread = [{"type": "http.request", "body": await self._read(scope, receive, size), "more_body": False}]
            except ApiError as error:
                await error.response()(scope, receive, send)
                return

            scope.setdefault("state", {})["open_body"] = size

            async def replay() -> Message:
                return unread.pop() if unread else await receive()

            await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive, size: OpenBody) -> bytes:
        """Return the body, or its received part if the client has disconnected. Raises ApiError."""
        # The unread rest of a body would be parsed as the next request, so these errors close the connection.
        headers = {"Connection": "close"}
        too_large = ApiError(
            413, f"The request is larger than {self._max_bytes} bytes.", code="request_too_large", headers=headers
        )
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > self._max_bytes:
                        raise too_large
                    size.grow(len(body))
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(408, "The request did not arrive in time.", code="timeout", headers=headers) from error
