"""The server as an ASGI app."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from openmimo.engine.server.anthropic.errors import AnthropicForm
from openmimo.engine.server.anthropic.routes import message_routes
from openmimo.engine.server.backends.protocol import Backend
from openmimo.engine.server.config import ServerConfig
from openmimo.engine.server.http.browser import CheckHost, CheckOrigin
from openmimo.engine.server.http.errors import ErrorBody, install_handlers
from openmimo.engine.server.http.middleware import CountRequests, LimitBody, NameRequests, RequireKey
from openmimo.engine.server.http.operations import PAGE, PageFiles, operation_routes, page_routes
from openmimo.engine.server.http.service import Service
from openmimo.engine.server.openai.audio.routes_speech import speech_routes
from openmimo.engine.server.openai.audio.routes_transcriptions import transcription_routes
from openmimo.engine.server.openai.responses.routes import response_routes
from openmimo.engine.server.openai.routes_chat import chat_routes
from openmimo.engine.server.openai.routes_completions import completion_routes
from openmimo.engine.server.openai.routes_embeddings import embedding_routes
from openmimo.engine.server.openai.routes_models import model_routes, token_routes

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is rejected; param names the invalid field."},
    "5XX": {"model": ErrorBody, "description": "The server or its engine failed, is shutting down, or timed out."},
}


def create_app(backend: Backend, config: ServerConfig) -> FastAPI:
    """Build the app. `app.state.service` is its `Service`. Shutting the app down closes the backend."""
    service = Service(backend, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()
        await backend.close()

    app = FastAPI(
        title="openmimo",
        lifespan=lifespan,
        docs_url=None,  # the documentation pages load scripts from another host
        redoc_url=None,
        responses=_ERRORS,
    )
    app.state.service = service
    install_handlers(app)
    makers = (
        model_routes,
        completion_routes,
        chat_routes,
        response_routes,
        embedding_routes,
        speech_routes,
        transcription_routes,
        message_routes,
        token_routes,
        operation_routes,
    )
    routers = [*(make(service) for make in makers), page_routes()]
    for router in routers:
        app.include_router(router)
    app.mount("/page", PageFiles(directory=PAGE))
    paths = frozenset(route.path for router in routers for route in router.routes if isinstance(route, APIRoute))
    # The middleware added last runs first: a request gets its id and is counted, its Host and Origin headers are
    # checked, then its API key, and only then is its body read.
    app.add_middleware(
        LimitBody,
        max_bytes=max(config.max_body_bytes, 0 if service.speech is None else config.max_audio_bytes),
        open_bytes=service.open_bytes,
        timeout_seconds=config.request_timeout_seconds,
    )
    if config.required_key is not None:
        app.add_middleware(RequireKey, api_key=config.required_key)
    app.add_middleware(CheckOrigin, allowed=config.allowed_origins, refuses_others=config.required_key is None)
    if config.answered_hosts is not None:
        app.add_middleware(CheckHost, allowed=config.answered_hosts)
    app.add_middleware(AnthropicForm)
    app.add_middleware(
        CountRequests, count=lambda path, status: service.metrics.http_requests.labels(path, status).inc(), paths=paths
    )
    app.add_middleware(NameRequests)
    return app
