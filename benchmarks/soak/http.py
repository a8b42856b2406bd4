"""An HTTP/1.1 client on asyncio streams: one connection that is kept between requests, and can be cut at any time."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER without time: closing sends RST


@dataclass
class Response:
    """The head of a response, and its body as it arrives.

    Attributes:
        status: The status.
        headers: Names in lower case.
        chunks: The parts of the body.
    """

    status: int
    headers: dict[str, str]
    chunks: AsyncIterator[bytes]

    async def read(self) -> bytes:
        """Returns the rest of the body."""
        return b"".join([chunk async for chunk in self.chunks])

    async def lines(self) -> AsyncIterator[str]:
        """Yields the lines of the body, without their ends."""
        rest = b""
        async for chunk in self.chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line.decode().rstrip("\r")
        if rest:
            yield rest.decode()


class Connection:
    """A connection to a server, opened by the first request and whenever the last one was closed.

    Args:
        url: Scheme, host and port of the server.
    """

    def __init__(self, url: str):
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        self._host, self._port = parts.hostname, parts.port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, method: str, path: str, content: bytes = b"") -> Response:
        """Sends a request and returns the head of its response. Read its body before the next request.

        Raises:
            ConnectionError: The server closed the connection, or cannot be reached.
        """
        is_reused = self._streams is not None and not self._streams[0].at_eof()
        try:
            return await self._request(method, path, content)
        except ConnectionError:
            if not is_reused:
                raise
            self.close()  # the server may close an idle connection at any time
            return await self._request(method, path, content)

    async def send_part(self, path: str, content: bytes, num_bytes: int) -> None:
        """Sends the head of a POST request and the first `num_bytes` of its content."""
        await self._send("POST", path, content, num_bytes)

    def close(self) -> None:
        """Closes the connection, if it is open."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    def reset(self) -> None:
        """Closes the connection such that the server's system learns of an error (RST)."""
        if self._streams is not None:
            self._streams[1].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self._streams[1].transport.abort()
            self._streams = None

    async def _request(self, method: str, path: str, content: bytes) -> Response:
        reader = await self._send(method, path, content, len(content))
        status_line = await reader.readline()
        if not status_line:
            raise ConnectionResetError("the server closed the connection before it answered")
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return Response(int(status_line.split()[1]), headers, self._body(reader, headers))

    async def _send(self, method: str, path: str, content: bytes, num_bytes: int) -> asyncio.StreamReader:
        if self._streams is None or self._streams[0].at_eof():
            self.close()
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        head = f"{method} {path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content[:num_bytes])
        await writer.drain()
        return reader

    async def _body(self, reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
        try:
            if headers.get("transfer-encoding") == "chunked":
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    yield (await reader.readexactly(size + 2))[:-2]
                await reader.readuntil(b"\r\n")
            else:
                yield await reader.readexactly(int(headers.get("content-length", 0)))
        except asyncio.IncompleteReadError as error:
            self.close()
            raise ConnectionResetError("the server closed the connection within a response") from error
        if headers.get("connection") == "close":
            self.close()
