"""Rollouts by workers in other processes: assignment of samples, and replacement of workers that die.

A subclass starts workers and exchanges messages with them: processes of this machine, or actors of a cluster.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import replace
from typing import Any, Protocol

from openmimo.core.errors import UserError
from openmimo.core.samples import Sample
from openmimo.rl.rollouts.episode_steps import new_sample
from openmimo.rl.rollouts.worker import Cancel, Failure, Order, WorkerReport
from openmimo.rl.scheduling.groups import GroupRequest, LateReward

POLL_SECONDS = 0.1
_MAX_LOSSES = 3


class WorkerLostError(Exception):
    """A rollout worker died. The message is its last error, if there is one."""


class WorkerLink(Protocol):
    """The trainer's connection to one worker."""

    def send(self, order: Order) -> None:
        """Send an order. Does not fail if the worker is dead."""
        ...

    def receive(self) -> list[WorkerReport | Failure]:
        """The messages that arrived. Raises WorkerLostError if the worker is dead and no message is left."""
        ...

    def end(self, patience_seconds: float) -> None:
        """Wait up to `patience_seconds` for a worker that has the order to end, then kill it."""
        ...


class WorkerRollouts(ABC):
    """Rollouts by several workers.

    All samples of a request go to the worker with the fewest samples, where they share their prompt. Samples of a
    worker that dies end with finish_reason "error", so that the scheduler rolls them out again. Another worker replaces
    it, with the newest weights.

    Attributes:
        num_restarts: How many workers were replaced.
    """

    runs_while_learning = True
    repeats_exactly = False

    def __init__(self, num_workers: int):
        self.num_restarts = 0
        self._links: list[Any] = [self._start(number) for number in range(num_workers)]
        self._running: dict[str, tuple[int, GroupRequest]] = {}  # by sample id, with the number of the worker
        self._unscored: dict[str, tuple[int, GroupRequest]] = {}
        self._lost: list[Sample] = []
        self._losses = [0] * num_workers  # by worker number: deaths since one of that number finished a sample
        self._idle_seconds = self._seconds = 0.0
        self._last_reports: list[WorkerReport | None] = [None] * num_workers

    @abstractmethod
    def _start(self, number: int) -> WorkerLink:
        """Start worker `number` with the newest weights."""

    @abstractmethod
    def _wait(self, links: list[Any], seconds: float) -> list[Any]:
        """Wait up to `seconds` for messages. Returns the links that have some, or whose worker is dead."""

    @abstractmethod
    def _publish(self, version: int) -> None:
        """Publish the weights of the model to all workers."""

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._lost)

    def submit(self, request: GroupRequest) -> None:
        loads = Counter(number for number, _ in self._running.values())
        number = min(range(len(self._links)), key=lambda number: loads[number])
        self._running |= {sample_id: (number, request) for sample_id in request.sample_ids}
        self._links[number].send(request)

    @property
    def num_unscored(self) -> int:
        return len(self._unscored)

    def interrupt(self) -> list[Sample]:
        """No sample is interrupted: workers keep running while the trainer learns."""
        return []

    def poll(self) -> list[Sample | LateReward]:
        """Wait up to POLL_SECONDS for messages of workers.

        Raises:
            UserError: A worker cannot run with the settings.
            RuntimeError: A worker has died more than three times without finishing a sample.
        """
        finished: list[Sample | LateReward] = [*self._lost]
        self._lost = []
        for link in self._wait(self._links, 0.0 if finished else POLL_SECONDS):
            number = self._links.index(link)
            try:
                messages = link.receive()
            except WorkerLostError as error:
                finished += self._replace(number, str(error))
                continue
            for message in messages:
                if isinstance(message, WorkerReport):
                    finished += self._finished(number, message)
                elif message.is_users:
                    raise UserError(f"a rollout worker failed: {message.text}")
                else:
                    finished += self._replace(number, message.text)
                    break
        return finished

    def cancel(self, sample_ids: list[str]) -> None:
        by_number: dict[int, list[str]] = {}
        for sample_id in sample_ids:
            assigned = self._running.pop(sample_id, None) or self._unscored.pop(sample_id, None)
            if assigned is not None:
                by_number.setdefault(assigned[0], []).append(sample_id)
        for number, cancelled in by_number.items():
            self._links[number].send(Cancel(tuple(cancelled)))

    def update_weights(self, version: int) -> None:
        """Publish the weights. Each worker takes them between two steps of its engine."""
        self._publish(version)

    def metrics(self) -> dict[str, float]:
        """The share of time since the last call in which engines of ready workers were idle, and all restarts."""
        share = self._idle_seconds / self._seconds if self._seconds else 0.0
        self._idle_seconds = self._seconds = 0.0
        return {"rollout/idle_share": share, "rollout/restarts": self.num_restarts}

    def close(self) -> None:
        """End all workers."""
        for link in self._links:
            link.send(None)
        for link in self._links:
            link.end(patience_seconds=5.0)
        self._links, self._running, self._unscored, self._lost = [], {}, {}, []

    def _finished(self, number: int, report: WorkerReport) -> list[Sample | LateReward]:
        """The samples and rewards of a report that were not cancelled."""
        last = self._last_reports[number]
        self._idle_seconds += report.idle_seconds - (last.idle_seconds if last else 0.0)
        self._seconds += report.seconds - (last.seconds if last else 0.0)
        self._last_reports[number] = report
        if report.samples:
            self._losses[number] = 0
        return [item for item in report.samples if self._is_wanted(item)]

    def _is_wanted(self, item: Sample | LateReward) -> bool:
        """Whether an item was not cancelled. A sample without its reward becomes unscored."""
        if isinstance(item, LateReward):
            return self._unscored.pop(item.sample_id, None) is not None
        assigned = self._running.pop(item.info["sample_id"], None)
        if assigned is not None and math.isnan(item.reward) and item.finish_reason not in ("error", "too_long"):
            self._unscored[item.info["sample_id"]] = assigned
        return assigned is not None

    def _replace(self, number: int, last_error: str) -> list[Sample | LateReward]:
        """Replace a worker that died. Returns its samples as failed."""
        self._links[number].end(patience_seconds=0.0)
        self._losses[number] += 1
        if self._losses[number] > _MAX_LOSSES:
            raise RuntimeError(
                f"rollout worker {number} died {self._losses[number]} times without finishing a sample; the last time: "
                f"{last_error}"
            )
        self._last_reports[number] = None
        self._links[number] = self._start(number)
        self.num_restarts += 1
        lost = {sample_id: request for sample_id, (holder, request) in self._running.items() if holder == number}
        unscored = {sample_id: request for sample_id, (holder, request) in self._unscored.items() if holder == number}
        for sample_id in (*lost, *unscored):
            self._running.pop(sample_id, None)
            self._unscored.pop(sample_id, None)
        failed = [_failed(sample_id, request, last_error) for sample_id, request in (lost | unscored).items()]
        return [_late(sample) if sample.info["sample_id"] in unscored else sample for sample in failed]


def _late(sample: Sample) -> LateReward:
    """The failure of a sample that lacked only its reward."""
    return LateReward(sample.info["sample_id"], sample.domain, sample.group, math.nan, "error", sample.info)


def _failed(sample_id: str, request: GroupRequest, reason: str) -> Sample:
    sample = new_sample([], request, sample_id)
    error = {"error": f"the rollout worker is lost: {reason}", "error_kind": "a rollout worker is lost"}
    return replace(sample, finish_reason="error", info=sample.info | error)
