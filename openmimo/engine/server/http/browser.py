"""Protection against foreign web pages: checks of the Host and Origin headers.

A page of any site can make a browser on this machine send requests to this server. A site can also point a name that it
owns at this machine (DNS rebinding), which makes its page same-origin; the Host header reveals this. Other pages send
an Origin header with every request that can change state.
"""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openmimo.engine.server.config import ANY, is_loopback
from openmimo.engine.server.http.errors import ApiError
from openmimo.engine.server.http.middleware import REQUESTS

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_EXPOSED = "Retry-After, X-Request-Id, X-OpenMiMo-Warning"
_PREFLIGHT_SECONDS = "600"


class CheckHost:
    """Reject requests whose Host header names another server. `allowed` contains names without ports."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]):
        self._app = app
        self._allowed = frozenset(_host_name(name) for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in REQUESTS:
            for host in Headers(scope=scope).getlist("host"):
                if not self._allows(_host_name(host)):
                    error = ApiError(
                        403,
                        f"This server does not answer to the name {host!r}; start it with --allowed-hosts NAME to "
                        "allow the name, or with an API key to allow all.",
                        code="host_not_allowed",
                    )
                    await error.response()(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _allows(self, name: str) -> bool:
        return name in self._allowed or is_loopback(name)


class CheckOrigin:
    """Implement CORS for pages of `allowed` origins.

    Pages of other origins may not read responses. With `refuses_others`, their requests that can change state are
    rejected.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str], *, refuses_others: bool):
        self._app = app
        self._allowed = frozenset(origin.lower().rstrip("/") for origin in allowed)
        self._refuses_others = refuses_others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] in REQUESTS else Headers()
        origin = headers.get("origin")
        if origin is None:
            await self._app(scope, receive, send)
        elif ANY in self._allowed or origin.lower() in self._allowed:
            await self._answer_allowed(origin, headers, scope, receive, send)
        elif scope.get("method") == "OPTIONS" or (self._refuses_others and self._is_foreign(origin, headers, scope)):
            error = ApiError(
                403,
                f"Pages of the origin {origin!r} may not use this server; start it with --allowed-origins ORIGIN to "
                "allow them.",
                code="origin_not_allowed",
            )
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    @staticmethod
    def _is_foreign(origin: str, headers: Headers, scope: Scope) -> bool:
        if scope.get("method") in _SAFE_METHODS:  # a WebSocket has no method, and can change state
            return False
        return urlsplit(origin).netloc.lower() != headers.get("host", "").lower() or "://" not in origin

    async def _answer_allowed(self, origin: str, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        async def allow_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                response_headers = MutableHeaders(scope=message)
                response_headers["Access-Control-Allow-Origin"] = origin
                response_headers["Access-Control-Expose-Headers"] = _EXPOSED
                response_headers.add_vary_header("Origin")
            await send(message)

        app = self._app
        if scope.get("method") == "OPTIONS" and "access-control-request-method" in headers:
            app = _preflight(headers)
        await app(scope, receive, allow_and_send)


def _preflight(headers: Headers) -> Response:
    """The response to a CORS preflight request."""
    allowed = {
        "Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "authorization, content-type"),
        "Access-Control-Max-Age": _PREFLIGHT_SECONDS,
    }
    if "access-control-request-private-network" in headers:
        allowed["Access-Control-Allow-Private-Network"] = "true"
    return Response(status_code=204, headers=allowed)


def _host_name(host: str) -> str:
    """The name in a Host header, without its port and without the brackets of an IPv6 address."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if host.count(":") > 1 else host.partition(":")[0].rstrip(".")
