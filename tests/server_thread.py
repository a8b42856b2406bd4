"""A server in a thread of this process, for tests that talk to it over a real connection."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from openmimo.engine.server.backends.protocol import Backend
from openmimo.engine.server.config import ServerConfig
from openmimo.engine.server.serve import Server


@contextmanager
def running(backend: Backend, **settings) -> Iterator[Server]:
    """A started server on a free port; settings are those of `ServerConfig`. It has ended when the block has."""
    server = Server(backend, ServerConfig(port=0, **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Returns once the condition holds; fails if that never happens."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)
