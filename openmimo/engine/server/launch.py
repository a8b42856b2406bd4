"""`openmimo serve`: a checkpoint, or the stub, behind the server."""

import socket
from pathlib import Path

import torch

from openmimo.core.errors import ConfigError
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.server.config import ServerConfig
from openmimo.engine.server.engine_backend import EngineBackend
from openmimo.engine.server.serve import serve
from openmimo.engine.server.stub import StubBackend
from openmimo.engine.weights import quantize_linears
from openmimo.model.hf import load_model
from openmimo.runtime.device import resolve_device


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
