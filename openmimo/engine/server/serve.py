"""Runs the app until it is told to end: a first SIGTERM or Ctrl-C drains it, a second one ends what still runs."""

import asyncio
import gc
import socket
from types import FrameType

import uvicorn

from openmimo.engine.server.app import create_app
from openmimo.engine.server.backend import Backend
from openmimo.engine.server.config import ServerConfig

_LAST_WORDS_SECONDS = 5  # for clients to read the end of their replies once all of them have ended


class Server(uvicorn.Server):
    """A web server that goes on answering while its service drains: requests that run finish, new ones get a 503."""

    def __init__(self, backend: Backend, config: ServerConfig):
        app = create_app(backend, config)
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
            )
        )
        self._service = app.state.service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where the server listens; known once `started` is true."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, and says where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            print(f"{self._service.model_name} answers at {self.url} (chat page) and {self.url}/v1 (API)", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGTERM and SIGINT."""
        if self._service.is_draining:
            self._loop.call_soon_threadsafe(self._service.end_all)
        elif self._loop is None:
            self.should_exit = True
        else:
            self.begin_drain()

    def begin_drain(self) -> None:
        """Ends the server once its running requests have finished. May be called from any thread."""
        self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True


def serve(backend: Backend, config: ServerConfig) -> None:
    """Answers requests until SIGTERM or Ctrl-C, then drains."""
    gc.collect()
    gc.freeze()  # what is loaded by now stays: a collection that visits it would hold up every request
    Server(backend, config).run()
