"""POST /v1/embeddings: the pooled final states of texts, as vectors of length 1."""

import base64
import math
import secrets
from array import array
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from openmimo.core.records import Request as EngineRequest
from openmimo.core.records import SamplingParams
from openmimo.engine.server.chat.prompts import encode_prompts, listed_prompts
from openmimo.engine.server.http.bodies import JsonRoute, unless_disconnected
from openmimo.engine.server.http.errors import invalid
from openmimo.engine.server.http.service import Service
from openmimo.engine.server.openai.schema import EmbeddingRequest

_POOLING = "mean"


def embedding_routes(service: Service) -> APIRouter:
    """The endpoint /v1/embeddings of a service."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Returns a vector for each text."""
        service.check_model(body.model)
        work = service.prepared(lambda: _requests(service, body), is_large=request.state.is_large)
        requests = await unless_disconnected(request.receive, work)
        vectors = await unless_disconnected(request.receive, _vectors(service, requests))
        return JSONResponse(_answer(service, body, requests, vectors))

    return router


def _requests(service: Service, body: EmbeddingRequest) -> list[EngineRequest]:
    """Convert a body to checked engine requests, one for each text. Runs in a worker thread."""
    backend = service.backend
    prompts = encode_prompts(
        backend.tokenizer, listed_prompts(body.input), most_tokens=backend.max_positions, param="input"
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, pooling=body.pooling or _POOLING)
    requests = [EngineRequest(secrets.token_hex(12), tuple(prompt), params) for prompt in prompts]
    service.check(requests, param="input", structure_param="input")
    return requests


async def _vectors(service: Service, requests: Sequence[EngineRequest]) -> list[tuple[float, ...]]:
    """The embeddings in order. The engine gets at most as many texts at once as it may get replies."""
    vectors: list[tuple[float, ...]] = [()] * len(requests)
    most = service.config.max_choices
    for start in range(0, len(requests), most):
        generation = service.start(requests[start : start + most])
        try:
            async for index, delta in generation.deltas():
                vectors[start + index] = delta.embedding or vectors[start + index]
        finally:
            await generation.close()
    return vectors


def _answer(
    service: Service, body: EmbeddingRequest, requests: Sequence[EngineRequest], vectors: Sequence[Sequence[float]]
) -> dict[str, Any]:
    if body.dimensions not in (None, len(vectors[0])):
        raise invalid(f"The embeddings have {len(vectors[0])} dimensions and cannot be shortened.", "dimensions")
    num_tokens = sum(len(request.prompt_token_ids) for request in requests)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(map(_normalized, vectors))
    ]
    return {
        "object": "list",
        "data": data,
        "model": service.model_name,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _normalized(vector: Sequence[float]) -> list[float]:
    length = math.hypot(*vector) or 1.0
    return [value / length for value in vector]


def _encoded(vector: list[float], encoding: str | None) -> list[float] | str:
    if encoding != "base64":
        return vector
    values = array("f", vector)
    return base64.b64encode(values.tobytes()).decode()  # little-endian, as every machine that runs torch
