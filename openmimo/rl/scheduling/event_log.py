"""A log of the calls of the data scheduler since the last checkpoint: a killed run loses and repeats no sample.

The decisions of the scheduler depend only on the order of its calls. Each call with input from outside is a record in
the folder `events`. A resumed run repeats the recorded calls without sampling, and continues where the records end.

Each step has two append-only files, which are deleted once a checkpoint contains the step:

- `step-N.jsonl`: one line per record: its CRC-32 in hexadecimal, and a JSON object with ids, times and decisions.
- `step-N.arrays`: the arrays of the samples (`core/samples.py`), at the offsets in their records.

Arrays are written before their record, and a record before its call. Both are passed to the operating system at once,
so kill -9 loses nothing. They are flushed to the disk at the end of each rollout, before each checkpoint, and every
second while samples arrive, so a power failure loses at most the newest second. A truncated log is the log of an
earlier moment: reading ends at the first damaged record, and later samples are rolled out again.
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

from openmimo.core.errors import CheckpointError
from openmimo.core.files import naming
from openmimo.core.sample_files import read_sample, refer_to_file, write_sample
from openmimo.core.samples import ArrayFile, Sample
from openmimo.rl.scheduling.groups import GroupRequest, LateReward
from openmimo.rl.scheduling.scheduler import DataScheduler

_SYNC_SECONDS = 1.0


class LoggedScheduler:
    """A data scheduler whose calls are recorded, by step, before they are made.

    The routes of a recorded sample become references to the log, so that they use no memory.

    Attributes:
        scheduler: Makes the decisions.
    """

    def __init__(self, scheduler: DataScheduler, folder: Path, *, start: int = 0, repeats_exactly: bool = False):
        """
        Args:
            scheduler: Makes the decisions.
            folder: The folder of the log; created with the first record.
            start: The step of the checkpoint that the scheduler's state is from.
            repeats_exactly: Rolling out again gives the same samples in the same order. An incomplete step then starts
                again from its beginning: log-probabilities have the same bits only if the same samples are in the
                engine together.
        """
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
        if steps and steps[0] > start:  # they follow a checkpoint that is damaged
            self._forget(lambda step: True)
            steps = []
        self._last_logged = max(steps, default=-1)
        self._has_resumed = False

    def begin_step(self, step: int) -> list[GroupRequest]:
        """Begin a step, and repeat its recorded calls.

        Returns:
            The requests that were unfinished when the last process ended, for the last recorded step or a later one;
            otherwise nothing.
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
        """Whether an earlier process began this step, so that its submissions are repeated."""
        return step <= self._last_logged

    def next_submissions(self, max_samples: int) -> list[GroupRequest]:
        """Record the call, and return the requests of the scheduler."""
        self._write({"event": "submit", "slots": max_samples})
        return self.scheduler.next_submissions(max_samples)

    def on_sample(self, sample: Sample) -> None:
        """Record a sample, and pass it to the scheduler. Its routes become a reference to the log."""
        self._write({"event": "sample", "group": sample.group}, sample)
        self.scheduler.on_sample(sample.group, sample)

    def on_reward(self, late: LateReward) -> None:
        """Record a late reward, and pass it to the scheduler."""
        self._write({"event": "reward", "reward": asdict(late) | {"reward": _number(late.reward)}})
        self.scheduler.on_reward(late)

    def on_partial(self, sample: Sample) -> None:
        """Record an interrupted sample, and pass it to the scheduler. Its routes become a reference to the log."""
        self._write({"event": "partial", "group": sample.group}, sample)
        self.scheduler.on_partial(sample.group, sample)

    def take_batch(self) -> tuple[list[list[Sample]], dict[str, float]]:
        """Take the batch of the scheduler. The log is flushed to the disk first.

        Raises:
            CheckpointError: The repeated calls give another batch than the recorded one.
        """
        batch, report = self.scheduler.take_batch()
        ids = [sample.info["sample_id"] for group in batch for sample in group]
        if self._recorded_batch is None:
            self._write({"event": "batch", "samples": ids})
            self.sync()
        elif self._recorded_batch != ids:
            raise CheckpointError(
                f"The records in {self._records_path(self._step)} give another batch than the one that the "
                "policy learned from: they are of a run with other settings or of another version. Delete the folder "
                "to roll the step out again."
            )
        return batch, report

    def forget_before(self, step: int) -> None:
        """Delete the records of earlier steps, which a checkpoint contains."""
        self._forget(lambda other: other < step)

    def sync(self) -> None:
        """Flush the log to the disk: arrays first, so that no record on the disk lacks them."""
        if self._records is not None:
            assert self._arrays is not None
            with naming(self._path):
                self._arrays.sync()
                os.fsync(self._records.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Flush the log to the disk, and close the files of the step."""
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
            else:
                assert sample is not None, "records of samples have arrays"
                take = self.scheduler.on_partial if event["event"] == "partial" else self.scheduler.on_sample
                take(event["group"], sample)

    def _write(self, event: dict[str, Any], sample: Sample | None = None) -> None:
        event |= {"version": self._step, "time": round(time.time(), 3)}
        with naming(self._path):
            if self._records is None or self._arrays is None:
                self._records, self._arrays = self._open()
            if sample is not None:
                event |= _write_arrays(sample, self._arrays)
            text = json.dumps(event).encode()
            self._records.write(b"%08x %s\n" % (zlib.crc32(text), text))
            self._records.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def _open(self) -> tuple[BinaryIO, ArrayFile]:
        """Open the files of this step for appending, truncated before the first damaged record."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path, end, num_bytes = self._path, 0, 0
        for line, event, _ in _intact(path, self._arrays_path(self._step)):
            end += len(line)
            num_bytes = max(num_bytes, *event.get("bytes", [0]))
        arrays = ArrayFile(self._arrays_path(self._step))
        arrays.truncate(num_bytes)
        records = open(path, "ab")  # noqa: SIM115
        records.truncate(end)
        folder = os.open(self._folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        return records, arrays

    def _read(self, step: int) -> Iterator[tuple[dict[str, Any], Sample | None]]:
        """The intact records of a step, with their samples."""
        for _, event, arrays in _intact(self._records_path(step), self._arrays_path(step)):
            if "sample" not in event:
                yield event, None
                continue
            assert arrays is not None, "`_intact` checks the arrays of a record"
            yield event, read_sample(event["sample"], arrays)

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
        """Delete the records of an earlier version, which are of a step in progress; it is rolled out again."""
        old = list(self._folder.glob("step-*.events"))
        if old:
            print(
                f"warning: {self._folder} holds records in the format of an earlier version; the steps after the last "
                "checkpoint are rolled out again.",
                file=sys.stderr,
            )
        for path in old:
            path.unlink()


def _write_arrays(sample: Sample, arrays: ArrayFile) -> dict[str, Any]:
    """Append the arrays of a sample. Returns its record, with the range and the checksum of the bytes."""
    start, arrays.appended_checksum = arrays.num_bytes, 0
    values = write_sample(sample, arrays)
    refer_to_file(sample, values, arrays)
    return {"sample": values, "bytes": [start, arrays.num_bytes], "crc": arrays.appended_checksum}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number_from(value: float | None) -> float:
    return math.nan if value is None else value


def _intact(records: Path, arrays: Path) -> Iterator[tuple[bytes, dict[str, Any], ArrayFile | None]]:
    """The lines, events and array file of a step, up to the first truncated or damaged record."""
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
