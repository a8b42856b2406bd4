"""GET /v1/models, /v1/models/{id} and /tokenizer_info, POST /tokenize and /detokenize: the model and its tokenizer."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from openmimo.engine.server.chat.prompts import encode_messages, encode_text, prompt_ending
from openmimo.engine.server.config import ANY
from openmimo.engine.server.http import limits
from openmimo.engine.server.http.bodies import JsonRoute, unless_disconnected
from openmimo.engine.server.http.service import Service
from openmimo.engine.server.openai.conversation import template_messages, template_options
from openmimo.engine.server.openai.schema import DetokenizeRequest, TokenizeRequest


def model_routes(service: Service) -> APIRouter:
    """The endpoints that list and describe the service's model."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """Lists the served model under each of its names."""
        models = [_model(service, name) for name in service.model_names if name != ANY]
        ends = {"first_id": models[0]["id"], "last_id": models[-1]["id"], "has_more": False}
        return {"object": "list", "data": models, **ends}

    # A path parameter, because model names may contain slashes.
    @router.get("/v1/models/{model:path}")
    async def get_model(model: str) -> dict[str, Any]:
        """Describes the served model."""
        service.check_model(model)
        return _model(service, model)

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Describes the tokenizer, in the keys of tokenizer_config.json."""
        tokenizer = service.backend.tokenizer
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": service.backend.max_positions,
            "vocab_size": tokenizer.vocab_size,
            "bos_token": None,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.decode([tokenizer.pad_id], skip_special=False),
            "additional_special_tokens": list(tokenizer.special_tokens),
            "chat_template": tokenizer.chat_template,
        }

    return router


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "openmimo",
        "root": service.model_name,
        "max_model_len": service.backend.max_positions,
        # Anthropic's clients use the same path.
        "type": "model",
        "display_name": service.model_name,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": service.backend.max_positions,
        "max_tokens": min(service.config.max_tokens, service.backend.max_positions),
        **_modalities(service),
    }


def _modalities(service: Service) -> dict[str, Any]:
    """What the model reads and writes, for clients that show it, such as the chat page."""
    names = ["text"] if service.speech is None else ["text", "audio"]
    found: dict[str, Any] = {"input_modalities": names, "output_modalities": names}
    if service.speech is not None:
        found["voices"] = list(service.speech.model.voices)
    return found


def token_routes(service: Service) -> APIRouter:
    """The endpoints /tokenize and /detokenize of a service."""
    router = APIRouter(route_class=JsonRoute)
    tokenizer = service.backend.tokenizer

    async def answer(work: Callable[[], dict[str, Any]], request: Request) -> Response:
        prepared = service.prepared(lambda: JSONResponse(work()), is_large=request.state.is_large)
        return await unless_disconnected(request.receive, prepared)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Returns the token ids of a text or of a conversation."""
        service.check_model(body.model)
        return await answer(lambda: _tokenized(service, body), request)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Returns the text of token ids. Ids outside the vocabulary have no text."""
        service.check_model(body.model)
        return await answer(lambda: {"prompt": tokenizer.decode(body.tokens, skip_special=False)}, request)

    return router


def _tokenized(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    tokenizer, most = service.backend.tokenizer, limits.TOKENIZED_TOKENS
    if body.prompt is not None:
        # Clients that know only the name of the end-of-text token ask for its id in this way.
        is_special_name = body.prompt in tokenizer.special_tokens
        special = body.parse_special or body.allow_special or is_special_name
        ids = encode_text(tokenizer, body.prompt, most_tokens=most, param="prompt", allow_special=special)
    else:
        ids = encode_messages(
            tokenizer,
            template_messages(body.messages or []),
            [tool.model_dump(exclude_none=True) for tool in body.tools or []],
            template_options(body.chat_template_kwargs, None, "chat_template_kwargs"),
            most_tokens=most,
            ending=prompt_ending(
                add_generation_prompt=body.add_generation_prompt, continue_final_message=body.continue_final_message
            ),
        )
    return {"tokens": ids, "count": len(ids), "max_model_len": service.backend.max_positions}
