"""A server in a thread of this process, for tests that use a real connection."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

from openmimo.engine.server.backends.protocol import Backend
from openmimo.engine.server.config import ServerConfig
from openmimo.engine.server.serve import Server


@contextmanager
def running(backend: Backend, **settings) -> Iterator[Server]:
    """Starts a server on a free port and stops it when the block ends; settings are those of `ServerConfig`."""
    server = Server(backend, ServerConfig(port=0, **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server
    finally:
        server.should_exit = True
        thread.join()


def connect(server: Server, **options) -> httpx.Client:
    """A client of the server. It loads no certificates: HTTP needs none, and loading takes longer than most tests."""
    return httpx.Client(base_url=server.url, verify=False, **options)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Returns once the condition holds; fails after a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold within the deadline"
        time.sleep(0.005)
