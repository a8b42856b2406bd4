"""Orders from the leading process to all processes, itself included, and their answers.

    leading process    scatter(orders)   execute its own   gather(answers)   raise the first error
    other processes    receive           execute           answer            receive the next

Orders travel through a gloo group of their own, because the other processes wait in it for as long as the leading one
waits for environments. What an order makes them communicate (gradients, weights) uses the groups of the mesh.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from openmimo.core.errors import CheckpointError, ConfigError, DataError, DivergedError, UserError
from openmimo.parallel.mesh import LONG_TIMEOUT
from openmimo.rl.learning.policy_trainer import PackPlan, StepPlan
from openmimo.rl.rollouts.worker import Cancel
from openmimo.rl.scheduling.groups import GroupRequest

_BLOCK_BYTES = 4096
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class RolloutOrder:
    """Calls of the rollouts of a process.

    Attributes:
        calls: Requests to submit and samples to cancel, in order.
        then: What follows: a poll, an interruption, or nothing.
    """

    calls: tuple[GroupRequest | Cancel, ...]
    then: Literal["poll", "interrupt", "nothing"]


@dataclass(frozen=True)
class WeightsOrder:
    """Copy the weights of the trainer to the engines, as this version."""

    version: int


@dataclass(frozen=True)
class StepOrder:
    """Take an optimizer step."""

    plan: StepPlan


@dataclass(frozen=True)
class ScoreOrder:
    """Score the samples of packs.

    Attributes:
        parts: The domain of the teacher that scores (None: the policy does), and the packs of this process.
    """

    parts: list[tuple[str | None, list[PackPlan]]]


@dataclass(frozen=True)
class CheckOrder:
    """Check the weights, see `PolicyTrainer.check_weights`."""

    where: str


@dataclass(frozen=True)
class HeldOutOrder:
    """Roll out the held-out problems of these indices."""

    problems: tuple[int, ...]


@dataclass(frozen=True)
class GatherOrder:
    """Gather the model, and its optimizer if asked for, on the leading process."""

    with_optimizer: bool


@dataclass(frozen=True)
class EndOrder:
    """End the process; `has_failed` with an error."""

    has_failed: bool


Order = RolloutOrder | WeightsOrder | StepOrder | ScoreOrder | CheckOrder | HeldOutOrder | GatherOrder | EndOrder


@dataclass(frozen=True)
class Answer:
    """The result of an order, or the error that the user can correct."""

    value: Any = None
    error: UserError | None = None


def answer(execute: Callable[[Order], Any], order: Order) -> Answer:
    """Execute an order. An error of the user is part of the answer; any other ends this process."""
    try:
        return Answer(execute(order))
    except UserError as error:
        # a type whose only argument is the message survives the way to another process
        kind = type(error) if type(error) in (ConfigError, CheckpointError, DataError, DivergedError) else UserError
        return Answer(error=kind(str(error)))


class Channel:
    """The connection of the processes for orders. All of them create it together.

    A message is a block of fixed size with the number of bytes and as many of them as fit, and a second one with the
    rest, if there is any. Most orders and answers are a poll and nothing, so each process wakes up once for them.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def scatter(self, orders: Sequence[Order]) -> None:
        """Send each other process its order. Only the leading process calls this."""
        sent = [work for rank in range(1, self.count) for work in self._send(orders[rank], rank)]
        for work in sent:
            work.wait()

    def receive(self) -> Order:
        """Wait for an order of the leading process."""
        return self._receive(0)

    def gather(self) -> list[Answer]:
        """The answers of the other processes, by rank from 1. Only the leading process calls this."""
        return [self._receive(rank) for rank in range(1, self.count)]

    def reply(self, own: Answer) -> None:
        """Send an answer to the leading process."""
        for work in self._send(own, 0):
            work.wait()

    def _send(self, value: Any, rank: int) -> list[dist.Work]:
        payload = pickle.dumps(value)
        first = len(payload).to_bytes(_LENGTH_BYTES, "little") + payload[: _BLOCK_BYTES - _LENGTH_BYTES]
        blocks = [first.ljust(_BLOCK_BYTES, b"\0"), payload[_BLOCK_BYTES - _LENGTH_BYTES :]]
        works = []
        for block in blocks:
            if block:
                work = dist.isend(torch.frombuffer(bytearray(block), dtype=torch.uint8), rank, group=self._group)
                assert work is not None, "this process is in the group"
                works.append(work)
        return works

    def _receive(self, rank: int) -> Any:
        block = self._receive_bytes(_BLOCK_BYTES, rank)
        length = int.from_bytes(block[:_LENGTH_BYTES], "little")
        payload = block[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if len(payload) < length:
            payload += self._receive_bytes(length - len(payload), rank)
        return pickle.loads(payload)

    def _receive_bytes(self, count: int, rank: int) -> bytes:
        buffer = torch.empty(count, dtype=torch.uint8)
        dist.recv(buffer, rank, group=self._group)
        return buffer.numpy().tobytes()
