"""Request bodies: size checks, strict JSON parsing and validation, in a thread and while the client is connected."""

import asyncio
import functools
import re
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import pydantic_core
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import Receive

from openmimo.engine.server.http import limits
from openmimo.engine.server.http.errors import ClientGoneError, invalid, validation_error
from openmimo.engine.server.http.fields import IgnoredFields
from openmimo.engine.server.http.warnings import warn

_JSON_TYPE = re.compile(r"application/([a-z0-9.-]+\+)?json")
_LISTED_FIELDS = 16
_Body = TypeVar("_Body", bound=BaseModel)
_Result = TypeVar("_Result")


class JsonRoute(APIRoute):
    """A route whose endpoint takes `body`, a pydantic model, and `request`, and no other parameters.

    The raw body is dropped after parsing. `request.state.num_bytes` records its size, and `request.state.is_large`
    whether it exceeded `limits.LARGE_BODY_BYTES`. Ignored unknown fields are counted, and the response names them in a
    header.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that reads the body and calls the endpoint."""
        endpoint, model = self.endpoint, self.endpoint.__annotations__["body"]

        async def handle(request: Request) -> Response:
            _check_content_type(request)
            content = (await request.receive()).get("body", b"")
            request.state.num_bytes = len(content)
            request.state.is_large = len(content) > limits.LARGE_BODY_BYTES
            service = request.app.state.service
            most_values = max(limits.VALUES, 2 * service.backend.max_positions)
            read = functools.partial(read_body, content, model, most_values, strict=service.config.strict)
            work = service.prepared(read, is_large=request.state.is_large)
            body, ignored = await unless_disconnected(request.receive, work)
            service.metrics.count_ignored_fields(ignored)
            response = await endpoint(body=body, request=request)
            return warn(response, [f"ignored fields: {_header_list(ignored)}"] if ignored else [])

        return handle


def read_body(
    content: bytes, model: type[_Body], most_values: int = limits.VALUES, *, strict: bool = True
) -> tuple[_Body, tuple[str, ...]]:
    """Parse and validate a body.

    Args:
        content: The raw body.
        model: The body's schema.
        most_values: Maximum number of JSON values.
        strict: Whether unknown fields are rejected.

    Returns:
        The body, and the paths of the unknown fields that were ignored.

    Raises:
        ApiError: The body is invalid; the error names the first invalid field.
    """
    try:
        value = read_json(content, most_values)
    except ValueError as error:
        raise invalid(f"The body is not valid JSON: {error}", None, code="invalid_json") from error
    if not isinstance(value, dict):
        raise invalid("The body must be a JSON object.", None)
    ignored = IgnoredFields()
    try:
        body = model.model_validate(value, context=None if strict else ignored)
    except ValidationError as error:
        raise validation_error(error) from error
    return body, ignored.paths(value) if ignored.found else ()


def _header_list(names: Sequence[str]) -> str:
    """Names as a list in a header, which holds only ASCII and no line ends."""
    listed = ", ".join(quote(name, safe="[]") for name in names[:_LISTED_FIELDS])
    return listed + (", ..." if len(names) > _LISTED_FIELDS else "")


def _check_content_type(request: Request) -> None:
    # A page of another origin may send text/plain and forms without a preflight request, but not JSON.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not _JSON_TYPE.fullmatch(media_type):
        raise invalid("The body must be a JSON object, sent as Content-Type: application/json.", None)


def read_json(content: bytes, most_values: int) -> Any:
    """Parse JSON. Raises ValueError if the text is not JSON or contains more than `most_values` values."""
    check_counts(content, most_values)
    return pydantic_core.from_json(content, allow_inf_nan=False)


def check_tree(value: Any, most_values: int) -> int:
    """Count the values in parsed JSON. Raises ValueError beyond `most_values` values or `limits.DEPTH` levels."""
    count, depth, level = 0, 0, [value]
    while level:
        count += len(level)
        if count > most_values:
            raise ValueError(f"it contains more than {most_values} values.")
        depth += 1
        if depth > limits.DEPTH:
            raise ValueError(f"it is nested more than {limits.DEPTH} levels deep.")
        level = [inner for outer in level for inner in _inside(outer)]
    return count


def dicts_in(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in parsed JSON."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
        waiting.extend(_inside(one))


def check_counts(content: bytes, most_values: int) -> None:
    """Raise ValueError if a JSON text contains too many values, without parsing it.

    The check runs first because the parser holds the interpreter lock while it creates the values. In valid JSON every
    value except the first of a list or an object follows a comma, and every second part between quotes is outside of
    strings.
    """
    unescaped = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > 2 * limits.STRINGS:
        raise ValueError(f"it contains more than {limits.STRINGS} strings.")
    outside = b"".join(unescaped.split(b'"')[::2])
    if sum(outside.count(mark) for mark in (b",", b"[", b"{")) > most_values:
        raise ValueError(f"it contains more than {most_values} values.")


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of `work`, or cancel `work` and raise ClientGoneError if the client disconnects first.

    The body of the request must have been read, so that the next message from `receive` is the disconnect.
    """
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGoneError
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
