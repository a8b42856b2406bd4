"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from fastapi import APIRouter

from openmimo.engine.server.generation import Service


def model_routes(service: Service) -> APIRouter:
    """The model endpoints on a service, which has one model."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """Lists the one model."""
        return {"object": "list", "data": [_model(service)]}

    # A path: names of models may hold slashes.
    @router.get("/v1/models/{model:path}")
    async def get_model(model: str) -> dict[str, Any]:
        """Describes a model."""
        service.check_model(model)
        return _model(service)

    return router


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "openmimo",
        "max_model_len": service.backend.max_positions,
    }
