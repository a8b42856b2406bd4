"""GET /health and /metrics."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from openmimo.engine.server.generation import Service


def operation_routes(service: Service) -> APIRouter:
    """What those who run the server look at."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, Any]:
        """Tells whether requests are accepted: 503 while the server ends or when the engine has died."""
        if (refusal := service.refusal()) is not None:
            raise refusal
        return {"status": "ok"}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Gives the metrics in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
