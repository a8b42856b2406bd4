"""Orders from the leading process to all processes, itself included, and their answers.

    leading process    scatter(orders)   execute its own   gather(answers)   raise the first error
    other processes    receive           execute           answer            receive the next

Orders travel through a gloo group of their own, because the other processes wait in it for as long as the leading one
waits for environments. What an order makes them communicate (gradients, weights) uses the groups of the mesh.
"""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

from openmimo.core.errors import UserError
from openmimo.rl.learning.policy_trainer import PackPlan, StepPlan
from openmimo.rl.rollouts.worker import Cancel
from openmimo.rl.scheduling.groups import GroupRequest

_TIMEOUT = datetime.timedelta(days=7)  # a process that has ended closes its connections, which ends the wait at once


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
    """Score the samples of each pack.

    Attributes:
        packs: The packs of this process.
        teacher: The domain of the teacher that scores (None: the policy does).
    """

    packs: list[PackPlan]
    teacher: str | None = None


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
    """The result of an order, or the message of the error that the user can correct."""

    value: Any = None
    error: str | None = None


def answer(execute: Callable[[Order], Any], order: Order) -> Answer:
    """Execute an order. An error of the user is part of the answer; any other ends this process."""
    try:
        return Answer(execute(order))
    except UserError as error:
        return Answer(error=str(error))


class Channel:
    """The connection of the processes for orders. All of them create it together."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def scatter(self, orders: Sequence[Order]) -> None:
        """Send each process its order. Only the leading process calls this."""
        dist.scatter_object_list([None], list(orders), src=0, group=self._group)

    def receive(self) -> Order:
        """Wait for an order of the leading process."""
        box: list[Any] = [None]
        dist.scatter_object_list(box, None, src=0, group=self._group)
        return box[0]

    def gather(self) -> list[Answer]:
        """The answers of the other processes, by rank from 1. Only the leading process calls this."""
        answers: list[Any] = [None] * self.count
        dist.gather_object(None, answers, dst=0, group=self._group)
        return answers[1:]

    def reply(self, own: Answer) -> None:
        """Send an answer to the leading process."""
        dist.gather_object(own, None, dst=0, group=self._group)
