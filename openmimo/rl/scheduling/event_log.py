"""What happened to the data scheduler since the last checkpoint, so that a killed run loses and repeats no sample.

The scheduler's decisions depend on the order of its calls only. Every call that brings something from outside is a
record in the folder `events`; a run that is started again calls the scheduler the same way, without sampling again what
is recorded, and goes on where the records end.

Each step has a file of its own, which only grows, and is deleted once a checkpoint has the step in it. A record is
written before its call is made. It is out of the process at once, so kill -9 loses nothing; it is on the disk within a
second, so a loss of power loses the newest records. What is lost is rolled out again: a log that is cut short anywhere
is the log of an earlier moment.

A record: three little-endian uint32 (bytes of JSON, bytes of arrays, CRC-32 of both), the JSON, the arrays of the
sample (`sample_io`).
"""

import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from openmimo.core.files import naming
from openmimo.core.samples import Sample
from openmimo.rl.scheduling.groups import GroupRequest
from openmimo.rl.scheduling.sample_files import pack_sample, unpack_sample
from openmimo.rl.scheduling.scheduler import DataScheduler

_HEAD = struct.Struct("<III")
_SYNC_SECONDS = 1.0


class LoggedScheduler:
    """A data scheduler whose calls are recorded, by step, before they are made.

    start: the step of the checkpoint that the scheduler's state is from. repeats_exactly: what is rolled out again
    comes out the same and in the same order. A step that was cut short is then begun again from its start, as only the
    same samples side by side in the engine have the same log-probabilities to the last bit.
    """

    def __init__(self, scheduler: DataScheduler, folder: Path, *, start: int = 0, repeats_exactly: bool = False):
        self.scheduler = scheduler
        self._folder = Path(folder)
        self._repeats_exactly = repeats_exactly
        self._step = start
        self._file: BinaryIO | None = None
        self._synced = 0.0
        self.forget_before(start)
        steps = [step for step in self._steps() if next(_records(self._path_of(step)), None) is not None]
        if steps and steps[0] > start:  # of after a checkpoint that turned out to be damaged
            self._forget(lambda step: True)
            steps = []
        self._last_logged = max(steps, default=-1)
        self._has_resumed = False

    @property
    def _path(self) -> Path:
        return self._path_of(self._step)

    def begin_step(self, step: int) -> list[GroupRequest]:
        """Begins a step, and repeats the calls that are recorded of it.

        What is returned was on its way when the process before this one ended, and has to be rolled out again: nothing,
        until the last step that is recorded.
        """
        self.close()
        self._step = step
        before = self.scheduler.state() if step == self._last_logged else {}
        self.scheduler.begin_step(step)
        if step <= self._last_logged:
            self._repeat()
        if before and self._repeats_exactly and not self.scheduler.is_complete():
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
        """See DataScheduler."""
        self._write({"event": "sample", "group": sample.group, "sample": sample})
        self.scheduler.on_sample(sample.group, sample)

    def forget_before(self, step: int) -> None:
        """Deletes the records of steps that a checkpoint has in it."""
        self._forget(lambda other: other < step)

    def sync(self) -> None:
        """Flushes to the disk what was written."""
        if self._file is not None:
            with naming(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Brings everything to the disk, and closes the file."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _repeat(self) -> None:
        for event, arrays in _records(self._path):
            if event["event"] == "submit":
                self.scheduler.next_submissions(event["slots"])
            else:
                self.scheduler.on_sample(event["group"], unpack_sample(event["sample"], arrays))

    def _write(self, event: dict[str, Any]) -> None:
        with naming(self._path):
            if self._file is None:
                self._file = self._open()
            arrays = b""
            if "sample" in event:
                plain, arrays = pack_sample(event["sample"])
                event = event | {"sample": plain}
            text = json.dumps(event).encode()
            checksum = zlib.crc32(arrays, zlib.crc32(text))
            self._file.write(_HEAD.pack(len(text), len(arrays), checksum) + text + arrays)
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def _open(self) -> BinaryIO:
        """The file of this step, for appending, without a record that was cut short."""
        self._folder.mkdir(parents=True, exist_ok=True)
        end = sum(_HEAD.size + len(body) for _, body in _bodies(self._path))
        file = open(self._path, "ab")  # noqa: SIM115
        file.truncate(end)
        folder = os.open(self._folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        return file

    def _path_of(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.events"

    def _steps(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("step-")) for path in self._folder.glob("step-*.events"))

    def _forget(self, is_forgotten: Callable[[int], bool]) -> None:
        for step in self._steps():
            if is_forgotten(step):
                self._path_of(step).unlink()


def _records(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The events of a file, with their arrays."""
    for text_bytes, body in _bodies(path):
        yield json.loads(body[:text_bytes]), body[text_bytes:]


def _bodies(path: Path) -> Iterator[tuple[int, bytes]]:
    """Of each record, the bytes of its JSON, and both parts; one that a crash cut short or damaged ends the file."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            text_bytes, array_bytes, checksum = _HEAD.unpack(head)
            body = file.read(text_bytes + array_bytes)
            is_whole = len(body) == text_bytes + array_bytes and zlib.crc32(body) == checksum
            if not text_bytes or not is_whole:
                return
            yield text_bytes, body
