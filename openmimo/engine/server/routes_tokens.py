"""POST /tokenize and /detokenize."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from openmimo.engine.server import limits
from openmimo.engine.server.chat import template_messages
from openmimo.engine.server.disconnect import unless_disconnected
from openmimo.engine.server.generation import Service
from openmimo.engine.server.json_body import JsonRoute
from openmimo.engine.server.prompts import encode_messages, encode_text
from openmimo.engine.server.schema import DetokenizeRequest, TemplateOptions, TokenizeRequest


def token_routes(service: Service) -> APIRouter:
    """The tokenizer's endpoints on a service."""
    router = APIRouter(route_class=JsonRoute)
    tokenizer = service.backend.tokenizer

    async def answer(work: Callable[[], dict[str, Any]], request: Request) -> Response:
        prepared = service.prepared(lambda: JSONResponse(work()), is_large=request.state.is_large)
        return await unless_disconnected(request.receive, prepared)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Gives the ids of a text or of a conversation."""
        service.check_model(body.model)
        return await answer(lambda: _tokenized(service, body), request)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Gives the text of ids; those beyond the vocabulary give none."""
        service.check_model(body.model)
        return await answer(lambda: {"prompt": tokenizer.decode(body.tokens, skip_special=False)}, request)

    return router


def _tokenized(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    tokenizer, most = service.backend.tokenizer, limits.TOKENIZED_TOKENS
    if body.prompt is not None:
        special = body.parse_special or body.allow_special
        ids = encode_text(tokenizer, body.prompt, most_tokens=most, param="prompt", allow_special=special)
    else:
        ids = encode_messages(
            tokenizer,
            template_messages(body.messages or []),
            [tool.model_dump(exclude_none=True) for tool in body.tools or []],
            body.chat_template_kwargs or TemplateOptions(),
            most_tokens=most,
            add_generation_prompt=body.add_generation_prompt,
        )
    return {"tokens": ids, "count": len(ids), "max_model_len": service.backend.max_positions}
