"""What happened to the data scheduler since the last checkpoint, so that a killed run loses and repeats no sample.

The scheduler's decisions depend on the order of its calls only. Every call that brings something from outside is a line
of `events.jsonl`; a run that is started again calls the scheduler the same way, without sampling anything anew, and
goes on where the file ends.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openmimo.core.files import naming, write_text_atomic
from openmimo.core.samples import Sample
from openmimo.rl.groups import GroupRequest
from openmimo.rl.sample_io import remove_cut_line, sample_from_dict, sample_to_dict
from openmimo.rl.scheduler import DataScheduler


class LoggedScheduler:
    """A data scheduler whose calls are written down, by step, before they are made.

    start: the step of the checkpoint that the scheduler's state is from. repeats_exactly: what is rolled out again
    comes out the same and in the same order. A step that was cut short is then begun anew, as only the same samples
    side by side in the engine have the same log-probabilities to the last bit.
    """

    def __init__(self, scheduler: DataScheduler, path: Path, *, start: int = 0, repeats_exactly: bool = False):
        self.scheduler = scheduler
        self._path = path
        self._repeats_exactly = repeats_exactly
        self._step = start
        self._file = None
        self._events = [event for event in _read(path) if event["step"] >= start]
        if self._events and self._events[0]["step"] > start:  # of after a checkpoint that turned out to be damaged
            self._events = []
            self._path.unlink()
        self._last_logged = max((event["step"] for event in self._events), default=-1)
        self._has_resumed = False

    def begin_step(self, step: int) -> list[GroupRequest]:
        """Begins a step, and repeats the calls that the file has for it.

        What is returned was on its way when the process before this one ended, and has to be rolled out anew: nothing,
        until the last step that the file has.
        """
        self._step = step
        before = self.scheduler.state() if step == self._last_logged else {}
        self.scheduler.begin_step(step)
        for event in [event for event in self._events if event["step"] == step]:
            if event["event"] == "submit":
                self.scheduler.next_submissions(event["slots"])
            else:
                self.scheduler.on_sample(event["group"], sample_from_dict(event["sample"]))
        self._events = [event for event in self._events if event["step"] > step]
        if before and self._repeats_exactly and not self.scheduler.is_complete():
            self.scheduler.load_state(before)
            self.scheduler.begin_step(step)
            self._keep(lambda event: event["step"] < step)
        if self._has_resumed or step < self._last_logged:
            return []
        self._has_resumed = True
        return self.scheduler.in_flight()

    def knows(self, step: int) -> bool:
        """Whether an earlier process began this step, so that what it submitted then is repeated."""
        return step <= self._last_logged

    def next_submissions(self, num_free_slots: int) -> list[GroupRequest]:
        """See DataScheduler."""
        self._write({"event": "submit", "slots": num_free_slots})
        return self.scheduler.next_submissions(num_free_slots)

    def on_sample(self, sample: Sample) -> None:
        """See DataScheduler."""
        self._write({"event": "sample", "group": sample.group, "sample": sample_to_dict(sample)})
        self.scheduler.on_sample(sample.group, sample)

    def forget_before(self, step: int) -> None:
        """Drops the lines of steps that a checkpoint has in it."""
        self._keep(lambda event: event["step"] >= step)

    def sync(self) -> None:
        """Flushes to the disk what was written."""
        if self._file is not None:
            with naming(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        self.close()
        kept = [json.dumps(event) + "\n" for event in _read(self._path) if is_kept(event)]
        write_text_atomic(self._path, "".join(kept))

    def _write(self, event: dict[str, Any]) -> None:
        with naming(self._path):
            if self._file is None:
                self._file = open(self._path, "ab+")  # noqa: SIM115
                remove_cut_line(self._file)
            self._file.write((json.dumps({"step": self._step, **event}) + "\n").encode())
            self._file.flush()


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines; one that a crash cut short ends the file."""
    if not path.exists():
        return
    with open(path) as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)
