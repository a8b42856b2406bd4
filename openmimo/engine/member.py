"""A rank of an engine on several devices: it holds a part of the model, and executes the steps that rank 0 plans.

`openmimo.engine.team` starts `main` in a process of its own. A rank reads records from the
pipe, does what they say, and answers those that load or start something. It ends when the pipe ends or rank 0 has
ended, also in the middle of a step.

The same classes serve rank 0: it executes what it sends.
"""

import datetime
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from openmimo.core.errors import UserError
from openmimo.engine.cache import PageArena
from openmimo.engine.step import HeadInput, StepInput
from openmimo.engine.worker import Worker
from openmimo.kernels.attention import Integers
from openmimo.parallel.inference import DividedModel, Division, RankGroup, is_lost_connection, text_logprobs
from openmimo.parallel.messages import decoded, encoded
from openmimo.runtime.device import free_memory_bytes, process_device

_PARENT_SECONDS = 0.5  # between looks at whether rank 0 lives
_CONNECT_TIMEOUT = datetime.timedelta(seconds=30)  # all ranks have loaded their parts before they connect
_STEP_TIMEOUT = datetime.timedelta(minutes=10)  # of a collective; a rank that has ended is noticed at once


class LoadPart(NamedTuple):
    """Load a part of a model.

    Attributes:
        path: The checkpoint folder.
        division: The part.
        dtype: Of weights and activations.
        device: "cpu" or an accelerator's type; a rank takes the one of its number.
        weights: Format of the weights.
        threads: CPU threads.
    """

    path: str
    division: Division
    dtype: str
    device: str
    weights: str
    threads: int


class StartWorker(NamedTuple):
    """Make the cache and the worker.

    Attributes:
        cache_bytes: Size of the cache of a rank.
        cache_dtype: Of its keys and values.
        page_positions: As in `EngineConfig`.
        num_drafts: MTP heads that draft.
        max_decided: As in `Worker`.
        integers: As in `Worker`.
    """

    cache_bytes: int
    cache_dtype: torch.dtype
    page_positions: int
    num_drafts: int
    max_decided: int
    integers: Integers | None


class ExecuteStep(NamedTuple):
    """Execute a step. `num_seats` are the seats of rank 0's cache."""

    step: StepInput
    num_seats: int


class DraftTokens(NamedTuple):
    """Draft only; see `Worker.draft`."""

    heads: tuple[HeadInput, ...]
    width: int


class ConnectRanks(NamedTuple):
    """Connect with the other ranks, which find each other through a file."""

    store: str


class SetWeight(NamedTuple):
    """Replace a weight by its part of a whole tensor."""

    name: str
    tensor: torch.Tensor


class ScoreText(NamedTuple):
    """Compute the log-probability of each token; see `text_logprobs`."""

    tokens_T: torch.Tensor


class Loaded(NamedTuple):
    """The answer to `LoadPart`, `ConnectRanks` and `StartWorker`.

    Attributes:
        error: What is wrong, for the user; empty if nothing is.
        num_bytes: Memory of the part of the model, or of the cache.
        free_bytes: Free memory of the device after that.
    """

    error: str
    num_bytes: int = 0
    free_bytes: int = 0


class Part:
    """What a rank holds: its part of the model, and how it reaches the other ranks.

    Raises:
        UserError: See `DividedModel`.
    """

    def __init__(self, setup: LoadPart):
        self.division = setup.division
        self.device = process_device(torch.device(setup.device), setup.division.rank)
        if self.device.type == "cpu":
            torch.set_num_threads(setup.threads)
        self.group = RankGroup(setup.division.size)
        self.divided = DividedModel(
            setup.path, setup.division, self.group, dtype=setup.dtype, device=self.device, weights=setup.weights
        )
        self.model = self.divided.model

    def loaded(self) -> Loaded:
        """The answer to `LoadPart`."""
        return Loaded("", self.divided.num_bytes, free_memory_bytes(self.device))

    def connect(self, store: str) -> None:
        """Wait for the other ranks."""
        places, division = dist.FileStore(store, self.division.size), self.division
        if self.device.type == "cpu":
            group = dist.ProcessGroupGloo(places, division.rank, division.size, _CONNECT_TIMEOUT)
            group._set_default_timeout(_STEP_TIMEOUT)
            self.group.use(group)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _STEP_TIMEOUT
            self.group.use(dist.ProcessGroupNCCL(places, division.rank, division.size, options))

    def arena(self, setup: StartWorker) -> PageArena:
        """Make the cache."""
        layers = self.model.config.attention_layers()[: len(self.model.config.layers) + setup.num_drafts]
        return PageArena(
            layers,
            cache_bytes=setup.cache_bytes,
            dtype=setup.cache_dtype,
            device=self.device,
            page_positions=setup.page_positions,
        )


class _Member:
    """Does what rank 0 says.

    Args:
        connection: To rank 0.
        part: What this rank holds.
    """

    def __init__(self, connection: Connection, part: Part):
        self._connection, self._part = connection, part
        self._arena: PageArena | None = None
        self._worker: Worker | None = None

    def run(self) -> None:
        """Do what rank 0 says until it closes the connection."""
        while True:
            try:
                message = self._connection.recv_bytes()
            except (EOFError, OSError):
                return
            self._do(decoded(message, self._part.device))

    def _do(self, record: Any) -> None:
        match record:
            case ExecuteStep(step, num_seats):
                assert self._arena is not None and self._worker is not None, "started before"
                self._arena.num_seats = num_seats
                self._worker.execute(step)
            case DraftTokens(heads, width):
                assert self._worker is not None, "started before"
                self._worker.draft(heads, width)
            case SetWeight(name, tensor):
                self._part.divided.set_weight(name, tensor)
            case ScoreText(tokens_T):
                with torch.inference_mode():
                    text_logprobs(self._part.model, tokens_T)
            case ConnectRanks(store):
                self._part.connect(store)
                self._connection.send_bytes(encoded(Loaded("")))
            case StartWorker():
                arena = self._arena = self._part.arena(record)
                self._worker = Worker(
                    self._part.model,
                    arena,
                    num_drafts=record.num_drafts,
                    max_decided=record.max_decided,
                    integers=record.integers,
                )
                num_bytes = arena.num_pages * arena.page_bytes
                self._connection.send_bytes(encoded(Loaded("", num_bytes, free_memory_bytes(self._part.device))))
            case _:
                raise AssertionError(f"rank 0 sent {type(record).__name__}")


def serve_member(connection: Connection) -> None:
    """Load what rank 0 says, and then do what it says until it closes the connection."""
    setup = decoded(connection.recv_bytes())
    assert isinstance(setup, LoadPart)
    try:
        part = Part(setup)
    except UserError as error:
        connection.send_bytes(encoded(Loaded(str(error))))
        return
    connection.send_bytes(encoded(part.loaded()))
    _Member(connection, part).run()


def follow_parent(parent: int) -> None:
    """End this process as soon as process `parent`, which started it, has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="openmimo-parent", daemon=True).start()


def main() -> None:
    """Serve the connection whose file descriptor is the first argument; the second is the process of rank 0."""
    descriptor, parent = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which ends this process
    follow_parent(parent)
    try:
        serve_member(Connection(descriptor))
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        os._exit(1)  # rank 0 says which rank has ended
    os._exit(0)  # there is nothing to save, and the end of an interpreter with torch takes seconds
