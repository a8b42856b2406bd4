"""Errors in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from openmimo.core.errors import UserError
from openmimo.engine.server.http.limits import shortened

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_TAG = re.compile(r"<[a-z ]+>")
_PARAM_CHARACTERS = 200
# pydantic names Python types, and for a union the type of one member. The other member of such unions is a text.
_KINDS = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a text",
}


class ErrorDetails(BaseModel):
    """Details of an error.

    Attributes:
        message: Explanation for people.
        type: Class of the error, by HTTP status.
        param: Path of the invalid field of the request.
        code: Machine-readable identifier of the error.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetails


class ApiError(Exception):
    """An error that is reported to the client.

    Args:
        status: HTTP status.
        message: Explanation for people.
        param: Path of the invalid field of the request.
        code: Machine-readable identifier of the error.
        headers: Additional headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error as a JSON object in OpenAI's format."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        param = self.param and shortened(self.param, _PARAM_CHARACTERS)
        return {"error": {"message": shortened(self.message), "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as an HTTP response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


class ClientGoneError(Exception):
    """The client closed the connection before the response was ready."""


def invalid(message: str, param: str | None, *, code: str | None = None) -> ApiError:
    """A 400: the request is invalid."""
    return ApiError(400, message, param=param, code=code)


def engine_failed(reason: str) -> ApiError:
    """A 500: the engine failed while it generated a reply."""
    return ApiError(500, f"The engine failed: {reason}", code="engine_error")


def install_handlers(app: FastAPI) -> None:
    """Convert every exception that the app's routes raise to a response in OpenAI's format."""
    app.exception_handler(ApiError)(_on_api_error)
    app.exception_handler(UserError)(_on_user_error)
    app.exception_handler(RequestValidationError)(_on_invalid_query)
    app.exception_handler(HTTPException)(_on_http_error)
    app.exception_handler(ClientGoneError)(_on_client_gone)
    app.exception_handler(Exception)(_on_bug)


async def _on_api_error(request: Request, error: ApiError) -> JSONResponse:
    return error.response()


async def _on_user_error(request: Request, error: UserError) -> JSONResponse:
    return invalid(str(error), None).response()


async def _on_invalid_query(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return invalid(f"{param}: {first['msg']}", param, code="invalid_value").response()


def validation_error(error: ValidationError) -> ApiError:
    """A 400 that names the first invalid field."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, context, location = first["type"], first.get("ctx", {}), first["loc"]
    if kind in ("unknown_field", "unsupported_field"):
        path = _param(location)
        param = f"{path}.{context['name']}" if path else context["name"]
        if kind == "unknown_field":
            return invalid(f"{param} is not a field that this server knows.", param, code="unknown_parameter")
        return invalid(f"{param} is not supported: {context['advice']}", param, code="unsupported_parameter")
    param = _param(location)
    if kind == "missing":
        return invalid(f"{param} is missing.", param, code="missing_parameter")
    reason = str(first["msg"]).removeprefix("Value error, ")
    if kind in _KINDS:
        is_text_or = location and isinstance(location[-1], str) and _TAG.fullmatch(location[-1])
        reason = f"it must be {'a text or ' if is_text_or else ''}{_KINDS[kind]}."
    return invalid(f"{param}: {reason}" if param else reason, param, code="invalid_value")


def _param(location: tuple[int | str, ...]) -> str | None:
    """The field's path, such as messages[0].content, without the <tags> that mark members of unions."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not _TAG.fullmatch(part):
            path += f".{part}" if path else part
    return path or None


async def _on_http_error(request: Request, error: HTTPException) -> JSONResponse:
    message = error.detail
    if error.status_code == 404:
        message = f"There is nothing at {request.url.path}."
    elif error.status_code == 405:
        message = f"{request.method} is not a method of {request.url.path}."
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _on_client_gone(request: Request, error: ClientGoneError) -> Response:
    return Response(status_code=499)  # the client cannot read it; the metrics count it


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    # Starlette raises the exception again after this response, and the web server logs it with its traceback.
    return ApiError(500, "The server failed; its log has the details.", code="internal_error").response()
