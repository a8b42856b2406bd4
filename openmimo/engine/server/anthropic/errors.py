"""Errors in Anthropic's format: {"type": "error", "error": {"type", "message"}, "request_id"}."""

import json
from typing import Any, Literal

from pydantic import BaseModel
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openmimo.engine.server.http.limits import shortened

NO_THREADS = "thread_unsupported_request"
_PATH = "/v1/messages"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class MessageErrorDetails(BaseModel):
    """The class of an error, and its explanation for people."""

    type: str
    message: str
    details: dict[str, Any] | None = None


class MessageErrorBody(BaseModel):
    """The body of every error response."""

    type: Literal["error"]
    error: MessageErrorDetails
    request_id: str


def anthropic_error(status: int, message: str) -> dict[str, Any]:
    """Return the object for an error with this HTTP status."""
    kind = _TYPES.get(status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": shortened(message)}}


class AnthropicForm:
    """Give responses of the Messages API Anthropic's header for the request id, and their errors its format.

    Every part of the server reports errors in OpenAI's format, the other middleware and the web framework included.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_ours = scope["type"] == "http" and (scope["path"] + "/").startswith(_PATH + "/")
        await self._app(scope, receive, _Rewriter(send, scope["state"]["request_id"]) if is_ours else send)


class _Rewriter:
    """Sends the messages of one response. Those of an error are held back until its body is complete."""

    def __init__(self, send: Send, request_id: str):
        self._send = send
        self._request_id = request_id
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["request-id"] = self._request_id
            if message["status"] >= 400:
                self._start = message
                return
        elif self._start is not None and message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_error(self._start)
            return
        await self._send(message)

    async def _send_error(self, start: Message) -> None:
        body = self._rewritten(start["status"]) if self._body else b""
        headers = MutableHeaders(scope=start)
        headers["content-length"] = str(len(body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    def _rewritten(self, status: int) -> bytes:
        error = json.loads(self._body)["error"]
        body = {**anthropic_error(status, error["message"]), "request_id": self._request_id}
        if error["code"] == NO_THREADS:  # clients try again without threads if they find the code here
            body["error"]["details"] = {"error_code": NO_THREADS}
        return json.dumps(body).encode()
