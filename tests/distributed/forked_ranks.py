"""The other ranks of an engine, forked from the test: these have imported the package already."""

import contextlib
import gc
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import torch

from openmimo.engine.config import EngineConfig
from openmimo.engine.member import follow_parent, serve_member
from openmimo.engine.team import MemberProcess, Team


class ForkedProcess:
    """A forked process with the methods of `subprocess.Popen` that a team calls."""

    def __init__(self, own: Connection, other: Connection):
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_serve, args=(own, other, os.getpid()), daemon=True)
        self._process.start()
        self._lock = threading.Lock()
        self.pid = self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        """Several threads may wait, unlike for `multiprocessing`."""
        deadline = time.monotonic() + (1e9 if timeout is None else timeout)
        while True:
            with self._lock:
                code = self._process.exitcode
            if code is not None:
                return code
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout or 0.0)
            time.sleep(0.01)

    def kill(self) -> None:
        self._process.kill()


def _serve(own: Connection, other: Connection, parent: int) -> None:
    gc.freeze()  # or this process would close connections of ranks that the test had earlier
    own.close()
    torch.set_num_threads(1)
    follow_parent(parent)
    try:
        serve_member(other)
    except RuntimeError:  # another rank was killed by the test
        os._exit(1)


def forked_member() -> MemberProcess:
    own, other = Pipe()
    with other:
        return MemberProcess(ForkedProcess(own, other), own)


@contextlib.contextmanager
def forked_team(
    path: str | Path, config: EngineConfig, *, dtype: str = "float64", weights: str = "plain"
) -> Iterator[Team]:
    team = Team(path, config, dtype=dtype, device="cpu", weights=weights, start=forked_member)
    try:
        yield team
    finally:
        team.close()
