"""POST /tokenize and /detokenize."""

from typing import Any

from fastapi import APIRouter

from openmimo.engine.server.chat import encode_messages, template_messages
from openmimo.engine.server.generation import Service
from openmimo.engine.server.json_body import JsonRoute
from openmimo.engine.server.schema import DetokenizeRequest, TemplateOptions, TokenizeRequest


def token_routes(service: Service) -> APIRouter:
    """The tokenizer's endpoints on a service."""
    router = APIRouter(route_class=JsonRoute)
    tokenizer = service.backend.tokenizer

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Gives the ids of a text or of a conversation."""
        service.check_model(body.model)
        if body.prompt is not None:
            ids = tokenizer.encode(body.prompt, allow_special=body.allow_special)
        else:
            ids = encode_messages(
                tokenizer,
                template_messages(body.messages or []),
                [tool.model_dump(exclude_none=True) for tool in body.tools or []],
                body.chat_template_kwargs or TemplateOptions(),
                add_generation_prompt=body.add_generation_prompt,
            )
        return {"tokens": ids, "count": len(ids), "max_model_len": service.backend.max_positions}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """Gives the text of ids; those beyond the vocabulary give none."""
        service.check_model(body.model)
        return {"prompt": tokenizer.decode(body.tokens, skip_special=False)}

    return router
