"""Request bodies: counted, parsed and validated in a thread, while the event loop goes on."""

import re
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from openmimo.engine.server import limits
from openmimo.engine.server.disconnect import unless_disconnected
from openmimo.engine.server.errors import invalid, validation_error
from openmimo.engine.server.json_values import read_json

_JSON_TYPE = re.compile(r"application/([a-z0-9.-]+\+)?json")
_Body = TypeVar("_Body", bound=BaseModel)


class JsonRoute(APIRoute):
    """A route whose endpoint takes `body`, a model, and `request`; what else the framework offers is not used.

    The body of the request is not kept: `request.state.is_large` tells whether it was large.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler."""
        endpoint, model = self.endpoint, self.endpoint.__annotations__["body"]

        async def handle(request: Request) -> Response:
            _check_content_type(request)
            content = (await request.receive()).get("body", b"")
            request.state.is_large = len(content) > limits.LARGE_BODY_BYTES
            service = request.app.state.service
            most = max(limits.VALUES, 2 * service.backend.max_positions)
            work = service.prepared(lambda: read_body(content, model, most), is_large=request.state.is_large)
            return await endpoint(body=await unless_disconnected(request.receive, work), request=request)

        return handle


def read_body(content: bytes, model: type[_Body], most_values: int = limits.VALUES) -> _Body:
    """The request in a body. Raises ApiError, which names the field at fault."""
    try:
        value = read_json(content, most_values)
    except ValueError as error:
        raise invalid(f"The body is not valid JSON: {error}", None, code="invalid_json") from error
    if not isinstance(value, dict):
        raise invalid("The body must be a JSON object.", None)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise validation_error(error) from error


def _check_content_type(request: Request) -> None:
    # A page of another origin may send text/plain and forms without asking first, but not JSON.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not _JSON_TYPE.fullmatch(media_type):
        raise invalid("The body must be a JSON object, sent as Content-Type: application/json.", None)
