"""GET /health, /ping, /version and /metrics for operators, and GET / for the chat page."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse, PlainTextResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

import openmimo
from openmimo.engine.server.http.service import Service

PAGE = Path(__file__).parents[1] / "page"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def operation_routes(service: Service) -> APIRouter:
    """The endpoints for health checks and metrics."""
    router = APIRouter()

    @router.get("/ping")
    @router.get("/health")
    async def health() -> dict[str, Any]:
        """Reports whether requests are accepted: 503 while the server drains or after the engine has failed."""
        if (refusal := service.refusal()) is not None:
            raise refusal
        return {"status": "ok", "ranks": service.backend.gauges().num_ranks}

    @router.get("/version")
    async def version() -> dict[str, str]:
        """Returns the version of openmimo."""
        return {"version": openmimo.__version__}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Returns the metrics in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


class PageFiles(StaticFiles):
    """The page's files, with headers that forbid a browser to load anything from another host."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def page_routes() -> APIRouter:
    """The endpoint of the chat page."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> Response:
        """Returns the chat page."""
        return FileResponse(PAGE / "index.html", headers=_HEADERS)

    return router
