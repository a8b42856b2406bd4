"""The calls of the data scheduler since the last checkpoint, so that a killed run loses and repeats no sample.

The decisions of the scheduler depend on the order of its calls only. Every call that brings something from outside is a
record in the folder `events`. A run that is started again makes the recorded calls again, without sampling, and
continues where the records end.

Each step has two files, which only grow, and are deleted once a checkpoint contains the step:

- `step-N.jsonl`: a line for each record: its CRC-32 in hexadecimal, and a JSON object with ids, times and decisions.
- `step-N.arrays`: the arrays of the samples (`core/array_file.py`), at the places that their records name.

Arrays are written before their record, and a record before its call is made. Both leave the process at once, so kill -9
loses nothing. They are on the disk at the end of each rollout, before each checkpoint, and within a second while
samples arrive, so a loss of power loses the newest second. A log that is cut anywhere is the log of an earlier moment:
the first damaged record ends it, and the rest is sampled again.
"""

import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from openmimo.core.array_file import ArrayFile
from openmimo.core.errors import CheckpointError
from openmimo.core.files import naming
from openmimo.core.sample_files import read_sample, refer_to_file, write_sample
from openmimo.core.samples import Sample
from openmimo.rl.scheduling.groups import GroupRequest, LateReward
from openmimo.rl.scheduling.scheduler import DataScheduler

_SYNC_SECONDS = 1.0


class LoggedScheduler:
    """A data scheduler whose calls are recorded, by step, before they are made.

    The routes of a sample that was recorded are references to the log: they are not held in memory.

    Args:
        scheduler: Makes the decisions.
        folder: Of the log; created with the first record.
        start: The step of the checkpoint that the state of the scheduler is from.
        repeats_exactly: What is sampled again is the same, in the same order. A step that was cut short then starts
            again from its beginning, as only the same samples next to each other in the engine have the same
            log-probabilities to the last bit.
    """

    def __init__(self, scheduler: DataScheduler, folder: Path, *, start: int = 0, repeats_exactly: bool = False):
        self.scheduler = scheduler
        self._folder = Path(folder)
        self._repeats_exactly = repeats_exactly
        self._step = start
        self._records: BinaryIO | None = None
        self._arrays: ArrayFile | None = None
        self._recorded_batch: list[str] | None = None
        self._synced = 0.0
        self._drop_format_before()
        self.forget_before(start)
        steps = [step for step in self._steps() if next(self._read(step), None) is not None]
        if steps and steps[0] > start:  # of a checkpoint that turned out to be damaged
            self._forget(lambda step: True)
            steps = []
        self._last_logged = max(steps, default=-1)
        self._has_resumed = False

    def begin_step(self, step: int) -> list[GroupRequest]:
        """Begins a step, and repeats the calls that are recorded of it.

        Returns:
            What was submitted when the last process ended and has to be rolled out again; nothing before the last step
            that is recorded.
        """
        self.close()
        self._step = step
        can_repeat = step == self._last_logged and self._repeats_exactly and not self.scheduler.in_flight()
        before = self.scheduler.state() if can_repeat else {}
        self.scheduler.begin_step(step)
        if step <= self._last_logged:
            self._repeat()
        if before and self._recorded_batch is None:
            self.scheduler.load_state(before)
            self.scheduler.begin_step(step)
            self._forget(lambda other: other >= step)
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
        """See DataScheduler. The routes of the sample become a reference to the log."""
        self._write({"event": "sample", "group": sample.group}, sample)
        self.scheduler.on_sample(sample.group, sample)

    def on_reward(self, late: LateReward) -> None:
        """See DataScheduler."""
        self._write({"event": "reward", "reward": asdict(late) | {"reward": _number(late.reward)}})
        self.scheduler.on_reward(late)

    def on_partial(self, sample: Sample) -> None:
        """See DataScheduler. The routes of the sample become a reference to the log."""
        self._write({"event": "partial", "group": sample.group}, sample)
        self.scheduler.on_partial(sample.group, sample)

    def take_batch(self) -> tuple[list[list[Sample]], dict[str, float]]:
        """See DataScheduler. The step is on the disk before anything is learned from it.

        Raises:
            CheckpointError: The repeated step gave another batch than the one that was recorded.
        """
        batch, report = self.scheduler.take_batch()
        ids = [sample.info["sample_id"] for group in batch for sample in group]
        if self._recorded_batch is None:
            self._write({"event": "batch", "samples": ids})
            self.sync()
        elif self._recorded_batch != ids:
            raise CheckpointError(
                f"The records in {self._records_path(self._step)} give another batch than the one that was learned "
                "from: they are of a run with other settings or of another version. Delete the folder to sample again."
            )
        return batch, report

    def forget_before(self, step: int) -> None:
        """Deletes the records of steps that a checkpoint contains."""
        self._forget(lambda other: other < step)

    def sync(self) -> None:
        """Flushes to the disk what was written: arrays first, so that no record on the disk lacks them."""
        if self._records is not None:
            with naming(self._path):
                self._arrays.sync()
                os.fsync(self._records.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Flushes everything to the disk and closes the files of the step."""
        self.sync()
        if self._records is not None:
            self._records.close()
        self._records = self._arrays = self._recorded_batch = None

    @property
    def _path(self) -> Path:
        return self._records_path(self._step)

    def _repeat(self) -> None:
        for event, sample in self._read(self._step):
            if event["event"] == "submit":
                self.scheduler.next_submissions(event["slots"])
            elif event["event"] == "batch":
                self._recorded_batch = event["samples"]
            elif event["event"] == "reward":
                late = event["reward"] | {"reward": _number_from(event["reward"]["reward"])}
                self.scheduler.on_reward(LateReward(**late))
            elif event["event"] == "partial":
                self.scheduler.on_partial(event["group"], sample)
            else:
                self.scheduler.on_sample(event["group"], sample)

    def _write(self, event: dict[str, Any], sample: Sample | None = None) -> None:
        event |= {"version": self._step, "time": round(time.time(), 3)}
        with naming(self._path):
            if self._records is None:
                self._open()
            if sample is not None:
                event |= self._write_arrays(sample)
            text = json.dumps(event).encode()
            self._records.write(b"%08x %s\n" % (zlib.crc32(text), text))
            self._records.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def _write_arrays(self, sample: Sample) -> dict[str, Any]:
        """Writes the arrays of a sample. Its record, with the place of all its bytes and their checksum."""
        start, self._arrays.appended_checksum = self._arrays.num_bytes, 0
        values = write_sample(sample, self._arrays)
        refer_to_file(sample, values, self._arrays)
        return {
            "sample": values,
            "bytes": [start, self._arrays.num_bytes],
            "crc": self._arrays.appended_checksum,
        }

    def _open(self) -> None:
        """Opens the files of this step for appending, without a record that was cut short and what follows it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path, end, num_bytes = self._path, 0, 0
        for line, event, _ in _intact(path, self._arrays_path(self._step)):
            end += len(line)
            num_bytes = max(num_bytes, *event.get("bytes", [0]))
        self._arrays = ArrayFile(self._arrays_path(self._step))
        self._arrays.truncate(num_bytes)
        self._records = open(path, "ab")  # noqa: SIM115
        self._records.truncate(end)
        folder = os.open(self._folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def _read(self, step: int) -> Iterator[tuple[dict[str, Any], Sample | None]]:
        """The intact records of a step, with their samples."""
        for _, event, arrays in _intact(self._records_path(step), self._arrays_path(step)):
            yield event, read_sample(event["sample"], arrays) if "sample" in event else None

    def _records_path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.jsonl"

    def _arrays_path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.arrays"

    def _steps(self) -> list[int]:
        return sorted({int(path.stem.removeprefix("step-")) for path in self._folder.glob("step-*.[ja]*")})

    def _forget(self, is_forgotten: Callable[[int], bool]) -> None:
        for step in self._steps():
            if is_forgotten(step):
                self._records_path(step).unlink(missing_ok=True)
                self._arrays_path(step).unlink(missing_ok=True)

    def _drop_format_before(self) -> None:
        """Deletes what the version before recorded: it was a step in progress, which is rolled out again."""
        old = list(self._folder.glob("step-*.events"))
        if old:
            print(
                f"warning: {self._folder} holds records in the format of an earlier version; the steps after the last "
                "checkpoint are rolled out again.",
                file=sys.stderr,
            )
        for path in old:
            path.unlink()


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number_from(value: float | None) -> float:
    return math.nan if value is None else value


def _intact(records: Path, arrays: Path) -> Iterator[tuple[bytes, dict[str, Any], ArrayFile | None]]:
    """Lines, events and the array file of a step, up to the first record that a crash cut short or damaged."""
    if not records.exists():
        return
    file = ArrayFile(arrays, read_only=True) if arrays.exists() else None
    with open(records, "rb") as lines:
        for line in lines:
            checksum, _, text = line.removesuffix(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
                return
            event = json.loads(text)
            if "bytes" in event and (file is None or file.checksum(*event["bytes"]) != event["crc"]):
                return
            yield line, event, file
