"""Rollouts by workers elsewhere, as the trainer sees them: who rolls out what, and what happens when one dies.

How a worker is started and spoken to is a subclass's: processes of this machine, or actors of a cluster.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any, Protocol

from openmimo.core.errors import UserError
from openmimo.core.samples import Sample
from openmimo.rl.rollouts.worker import Cancel, Failure, Order, Report
from openmimo.rl.scheduling.groups import GroupRequest, LateReward

POLL_SECONDS = 0.1
_MAX_LOSSES = 3


class WorkerLostError(Exception):
    """A worker is gone; its last words if it had some."""


class WorkerLink(Protocol):
    """The trainer's end of its line to one worker."""

    def send(self, order: Order) -> None:
        """Sends an order; says nothing if the worker is gone."""
        ...

    def receive(self) -> list[Report | Failure]:
        """What came in. Raises WorkerLostError if the worker is gone and all it said has been received."""
        ...

    def end(self, patience_seconds: float) -> None:
        """Waits so long for a worker that was told to end, then kills it."""
        ...


class WorkerRollouts(ABC):
    """See Rollouts. All samples of a request go to the worker that has the fewest, so that they share their prompt.

    Samples of a worker that dies come back with finish_reason "error", for the scheduler to roll out again, and another
    worker takes its place with the newest weights. num_restarts: how often that happened. poll raises UserError for
    what a worker refuses because of the settings, and RuntimeError if workers die again and again.
    """

    def __init__(self, num_workers: int):
        self.num_restarts = 0
        self._links: list[Any] = [self._start(number) for number in range(num_workers)]
        self._running: dict[str, tuple[int, GroupRequest]] = {}  # by sample id, the worker's number too
        self._unscored: dict[str, tuple[int, GroupRequest]] = {}
        self._lost: list[Sample] = []
        self._losses = [0] * num_workers  # of each place, since a worker there finished a sample
        self._idle_seconds = self._seconds = 0.0
        self._last_reports: list[Report | None] = [None] * num_workers

    @abstractmethod
    def _start(self, number: int) -> WorkerLink:
        """Starts worker `number`, which begins with the newest weights."""

    @abstractmethod
    def _wait(self, links: list[Any], seconds: float) -> list[Any]:
        """Waits at most so long for something to receive. The links that have something."""

    @abstractmethod
    def _publish(self, version: int) -> None:
        """Makes the model's weights the newest ones for all workers."""

    @property
    def num_running(self) -> int:
        """See Rollouts."""
        return len(self._running) + len(self._lost)

    def submit(self, request: GroupRequest) -> None:
        """See Rollouts."""
        loads = Counter(number for number, _ in self._running.values())
        number = min(range(len(self._links)), key=lambda number: loads[number])
        self._running |= {sample_id: (number, request) for sample_id in request.sample_ids}
        self._links[number].send(request)

    @property
    def num_unscored(self) -> int:
        """See Rollouts."""
        return len(self._unscored)

    def interrupt(self) -> list[Sample]:
        """See Rollouts. Workers keep running while the trainer learns."""
        return []

    def poll(self) -> list[Sample | LateReward]:
        """See Rollouts. Waits at most a tenth of a second."""
        finished, self._lost = self._lost, []
        for link in self._wait(self._links, 0.0 if finished else POLL_SECONDS):
            number = self._links.index(link)
            try:
                messages = link.receive()
            except WorkerLostError as error:
                finished += self._replace(number, str(error))
                continue
            for message in messages:
                if isinstance(message, Report):
                    finished += self._finished(number, message)
                elif message.is_users:
                    raise UserError(f"a rollout worker says: {message.text}")
                else:
                    finished += self._replace(number, message.text)
                    break
        return finished

    def cancel(self, sample_ids: list[str]) -> None:
        """See Rollouts."""
        by_number: dict[int, list[str]] = {}
        for sample_id in sample_ids:
            place = self._running.pop(sample_id, None) or self._unscored.pop(sample_id, None)
            if place is not None:
                by_number.setdefault(place[0], []).append(sample_id)
        for number, own in by_number.items():
            self._links[number].send(Cancel(tuple(own)))

    def update_weights(self, version: int) -> None:
        """See Rollouts. Each worker takes them between two steps of its engine, whenever it comes to that."""
        self._publish(version)

    def metrics(self) -> dict[str, float]:
        """Since the last call, the share of the workers' time in which their engines had nothing to do; restarts.

        A worker that is starting has no time yet.
        """
        share = self._idle_seconds / self._seconds if self._seconds else 0.0
        self._idle_seconds = self._seconds = 0.0
        return {"rollout/idle_share": share, "rollout/restarts": self.num_restarts}

    def close(self) -> None:
        """See Rollouts. Returns when no worker is left."""
        for link in self._links:
            link.send(None)
        for link in self._links:
            link.end(patience_seconds=5.0)
        self._links, self._running, self._unscored, self._lost = [], {}, {}, []

    def _finished(self, number: int, report: Report) -> list[Sample | LateReward]:
        """The samples that are still wanted."""
        last = self._last_reports[number]
        self._idle_seconds += report.idle_seconds - (last.idle_seconds if last else 0.0)
        self._seconds += report.seconds - (last.seconds if last else 0.0)
        self._last_reports[number] = report
        if report.samples:
            self._losses[number] = 0
        return [item for item in report.samples if self._is_wanted(item)]

    def _is_wanted(self, item: Sample | LateReward) -> bool:
        """Whether it was not cancelled. Of a sample without its reward, the reward is awaited from now on."""
        if isinstance(item, LateReward):
            return self._unscored.pop(item.sample_id, None) is not None
        place = self._running.pop(item.info["sample_id"], None)
        if place is not None and math.isnan(item.reward) and item.finish_reason not in ("error", "too_long"):
            self._unscored[item.info["sample_id"]] = place
        return place is not None

    def _replace(self, number: int, last_words: str) -> list[Sample | LateReward]:
        """Starts another worker in the place of one that died. What it was at, as failed samples."""
        self._links[number].end(patience_seconds=0.0)
        self._losses[number] += 1
        if self._losses[number] > _MAX_LOSSES:
            raise RuntimeError(
                f"rollout worker {number} died {self._losses[number]} times without finishing a sample; the last time: "
                f"{last_words}"
            )
        self._last_reports[number] = None
        self._links[number] = self._start(number)
        self.num_restarts += 1
        lost = {sample_id: request for sample_id, (place, request) in self._running.items() if place == number}
        unscored = {sample_id: request for sample_id, (place, request) in self._unscored.items() if place == number}
        for sample_id in (*lost, *unscored):
            self._running.pop(sample_id, None)
            self._unscored.pop(sample_id, None)
        failed = [_failed(sample_id, request, last_words) for sample_id, request in (lost | unscored).items()]
        return [_late(sample) if sample.info["sample_id"] in unscored else sample for sample in failed]


def _late(sample: Sample) -> LateReward:
    """The failure of a sample that lacked its reward alone."""
    return LateReward(sample.info["sample_id"], sample.domain, sample.group, math.nan, "error", sample.info)


def _failed(sample_id: str, request: GroupRequest, why: str) -> Sample:
    return Sample(
        [], [], [], [],
        domain=request.source,
        group=request.group_id,
        finish_reason="error",
        temperature=request.temperature,
        info={"sample_id": sample_id, "problem": request.problem.id, "error": f"the rollout worker is lost: {why}",
              "error_kind": "a rollout worker is lost"},
    )  # fmt: skip
