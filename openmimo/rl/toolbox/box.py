"""The Toolbox: rates, concurrency limits and deadlines of tools."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from openmimo.core.errors import ConfigError
from openmimo.rl.toolbox.rate import TokenBucket
from openmimo.rl.toolbox.records import (
    ToolCounts,
    ToolFailureError,
    ToolLimits,
    ToolMistakeError,
    ToolResult,
    WorkerTimeoutError,
)
from openmimo.rl.toolbox.workers import ThreadWorkers, Worker, WorkerPool

StartPool = Callable[[Callable[[], Worker], int], WorkerPool]


@dataclass(frozen=True)
class Tool:
    """A tool: the factory of its workers, and its limits."""

    make_worker: Callable[[], Worker]
    limits: ToolLimits = field(default_factory=ToolLimits)


@dataclass
class _Entry:
    limits: ToolLimits
    pool: WorkerPool
    bucket: TokenBucket | None
    counts: ToolCounts


class Toolbox:
    """Calls tools within their limits. Thread-safe. Use it as a context manager, or close it.

    Args:
        tools: The tools by name.
        start_pool: `start_pool(make_worker, size)` starts the workers of a tool: threads by default, `RayWorkers` for
            actors.
    """

    def __init__(self, tools: Mapping[str, Tool], start_pool: StartPool = ThreadWorkers):
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        for name, tool in tools.items():
            limits = tool.limits
            bucket = TokenBucket(limits.calls_per_second, limits.burst) if limits.calls_per_second else None
            self._entries[name] = _Entry(limits, start_pool(tool.make_worker, limits.quota), bucket, ToolCounts())

    def __enter__(self) -> "Toolbox":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def call(
        self,
        name: str,
        arguments: Mapping[str, Any],
        *,
        cancelled: threading.Event | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> ToolResult:
        """Waits for a worker and calls a tool. Mistakes of the model and time-outs are part of the result.

        Args:
            name: The tool.
            arguments: The arguments of the call.
            cancelled: Cancels a call that is still waiting.
            on_end: Called once when the call has completely ended, which may be after this method returns if the call
                timed out.

        Raises:
            ToolFailureError: The infrastructure failed.
            ConfigError: The tool is unknown.
        """
        if name not in self._entries:
            on_end()
            raise ConfigError(f"the toolbox has no tool {name!r}; it has {', '.join(self._entries)}.")
        entry = self._entries[name]
        try:
            worker = self._taken(entry, cancelled or threading.Event())
        except BaseException:
            on_end()
            raise
        with self._running(entry.counts):
            try:
                return ToolResult(entry.pool.run(worker, arguments, entry.limits.timeout_seconds, on_end))
            except ToolMistakeError as mistake:
                self._count(entry.counts, mistakes=1)
                return ToolResult(str(mistake), "mistake")
            except WorkerTimeoutError as timeout:
                self._count(entry.counts, timeouts=1)
                return ToolResult(str(timeout), "timeout")
            except ToolFailureError:
                self._count(entry.counts, failures=1)
                raise

    def counts(self, name: str) -> ToolCounts:
        """The current counters of one tool."""
        with self._lock:
            return dataclasses.replace(self._entries[name].counts)

    def metrics(self) -> dict[str, float]:
        """All counters as `<tool>/<counter>`, with the mean waiting and running time of a call in seconds."""
        found: dict[str, float] = {}
        for name, entry in self._entries.items():
            counts = self.counts(name)
            values = dataclasses.asdict(counts) | {"restarts": entry.pool.num_restarts}
            values["mean_wait_seconds"] = counts.wait_seconds / max(1, counts.calls)
            values["mean_run_seconds"] = counts.run_seconds / max(1, counts.calls)
            found |= {f"{name}/{key}": float(value) for key, value in values.items()}
        return found

    def close(self) -> None:
        """Stops all workers. Waiting calls fail."""
        for entry in self._entries.values():
            entry.pool.close()

    def _taken(self, entry: _Entry, cancelled: threading.Event) -> Any:
        """Takes a worker, then waits for the rate limit. In this order no reserved rate token expires unused."""
        patience, began = entry.limits.wait_seconds, time.monotonic()
        self._count(entry.counts, calls=1, waiting=1)
        try:
            worker = entry.pool.take(patience, cancelled)
            if worker is not None and entry.bucket is not None:
                delay = entry.bucket.reserve(patience - (time.monotonic() - began))
                if delay is None:
                    entry.pool.give_back(worker)
                    raise ToolFailureError(f"the rate limit permits no call within {patience:g} seconds")
                cancelled.wait(delay)
        except ToolFailureError:
            self._count(entry.counts, failures=1)
            raise
        finally:
            self._count(entry.counts, waiting=-1, wait_seconds=time.monotonic() - began)
        if worker is None or cancelled.is_set():
            if worker is not None:
                entry.pool.give_back(worker)
            self._count(entry.counts, cancelled=1)
            raise ToolFailureError("the call was cancelled before it began")
        return worker

    @contextlib.contextmanager
    def _running(self, counts: ToolCounts) -> Iterator[None]:
        began = time.monotonic()
        self._count(counts, running=1)
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self._count(counts, running=-1, run_seconds=seconds)
            with self._lock:
                counts.longest_seconds = max(counts.longest_seconds, seconds)

    def _count(self, counts: ToolCounts, **more: float) -> None:
        with self._lock:
            for name, amount in more.items():
                setattr(counts, name, getattr(counts, name) + amount)
