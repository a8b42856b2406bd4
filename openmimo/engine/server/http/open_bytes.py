"""The total size of the bodies and messages that the server holds, within one limit."""

from collections.abc import Iterator
from contextlib import contextmanager

from openmimo.engine.server.http.errors import ApiError
from openmimo.engine.server.http.limits import LARGE_BODY_BYTES


class OpenBytes:
    """The bytes of all open bodies, except bodies of up to `LARGE_BODY_BYTES`.

    Args:
        most: Maximum total size. One body alone may exceed it.
        retry_after_seconds: Value of the Retry-After header of a 429.
    """

    def __init__(self, most: int, *, retry_after_seconds: int):
        self._most = most
        self._num_bytes = 0
        self._retry_after_seconds = retry_after_seconds

    @contextmanager
    def body(self) -> Iterator["OpenBody"]:
        """Count one body while it is open."""
        body = OpenBody(self)
        try:
            yield body
        finally:
            self._num_bytes -= body.num_bytes

    def grow(self, body: "OpenBody", num_bytes: int) -> None:
        """Record that a body has grown to `num_bytes`. Raises ApiError (429) beyond the maximum total size."""
        if num_bytes <= LARGE_BODY_BYTES:
            return
        self._num_bytes += num_bytes - body.num_bytes
        body.num_bytes = num_bytes
        if self._num_bytes > max(self._most, num_bytes):
            raise ApiError(
                429,
                f"The open requests already have {self._most} bytes; try again.",
                code="queue_full",
                headers={"Retry-After": str(self._retry_after_seconds), "Connection": "close"},
            )


class OpenBody:
    """The share of one body in the open bytes."""

    def __init__(self, total: OpenBytes):
        self.num_bytes = 0
        self._total = total

    def grow(self, num_bytes: int) -> None:
        """Record that the body has `num_bytes`. Raises ApiError as `OpenBytes.grow`."""
        self._total.grow(self, num_bytes)

    def add(self, num_bytes: int) -> None:
        """Record that the request holds more, such as decoded sound. Raises ApiError as `OpenBytes.grow`."""
        self.grow(self.num_bytes + num_bytes)
