"""`openmimo serve`: loads a checkpoint, or the stub, and answers requests until a signal ends the server.

A first SIGTERM or Ctrl-C drains the server, a second one aborts the requests that still run.
"""

import asyncio
import gc
import socket
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from openmimo.core.errors import ConfigError
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.server.app import create_app
from openmimo.engine.server.backends.engine import EngineBackend
from openmimo.engine.server.backends.protocol import Backend
from openmimo.engine.server.backends.stub import StubBackend
from openmimo.engine.server.config import ServerConfig
from openmimo.engine.weights import quantize_linears
from openmimo.model.hf import load_model
from openmimo.runtime.device import resolve_device

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


def launch(
    path: str, server: ServerConfig, engine: EngineConfig, *, dtype: str, device: str, threads: int | None, int8: bool
) -> None:
    """Loads the checkpoint in `path` and answers requests until told to end. Raises UserError before that."""
    check_address(server)
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads is {threads}; it must be at least 1.")
        torch.set_num_threads(threads)
    tokenizer = Tokenizer.load(path)
    place = resolve_device(device)
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    model = load_model(path, dtype=dtype, device=str(place))
    if int8:
        quantize_linears(model)
    backend = EngineBackend(Engine(model, tokenizer, engine), tokenizer, model_name=Path(path).resolve().name)
    serve(backend, server)


def launch_stub(server: ServerConfig) -> None:
    """Serves no model: `stub.echo` answers."""
    check_address(server)
    serve(StubBackend(), server)


def check_address(server: ServerConfig) -> None:
    """Raises ConfigError if the server cannot listen at its host and port, before a model is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
            trial.listen()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is no host name"
        raise ConfigError(
            f"the server cannot listen on --host {server.host} --port {server.port}: {reason}. Name another port "
            "(0: a free one) or an address of this machine."
        ) from error
