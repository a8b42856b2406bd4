"""Warm workers of one tool: started before the first call, replaced when they break or hang."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from openmimo.rl.toolbox.records import ToolFailureError, ToolMistakeError, WorkerTimeoutError

_GLANCE_SECONDS = 0.05
_CLOSING_SECONDS = 5.0


class Worker(Protocol):
    """What does a tool's work, one call at a time."""

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """The tool's answer. Raises ToolMistakeError for the model's mistakes; after anything else it is replaced."""
        ...

    def close(self) -> None:
        """Gives back what it holds."""
        ...


class WorkerPool(Protocol):
    """The workers of one tool: threads here, or actors elsewhere."""

    num_restarts: int

    def take(self, patience_seconds: float, cancelled: threading.Event) -> Any:
        """A worker of one's own; None if `cancelled` is set first. Raises ToolFailureError if none comes free."""
        ...

    def give_back(self, worker: Any) -> None:
        """Returns a worker that was taken and not run."""
        ...

    def run(self, worker: Any, arguments: Mapping[str, Any], timeout_seconds: float, on_end: Callable[[], None]) -> Any:
        """Runs a taken worker, and returns it or replaces it. `on_end` is called once nothing runs any more.

        Raises ToolMistakeError, WorkerTimeoutError, or ToolFailureError for whatever else went wrong.
        """
        ...

    def close(self) -> None:
        """Ends all workers."""
        ...


class IdleWorkers:
    """The workers that wait, for any kind of pool."""

    def __init__(self) -> None:
        self._idle: list[Any] = []
        self._closed = False
        self._changed = threading.Condition()

    def take(self, patience_seconds: float, cancelled: threading.Event) -> Any:
        """See WorkerPool."""
        deadline = time.monotonic() + patience_seconds
        with self._changed:
            while True:
                if cancelled.is_set():
                    return None
                if self._closed:
                    raise ToolFailureError("the toolbox is closed")
                if self._idle:
                    return self._idle.pop()
                remaining = deadline - time.monotonic()
                if remaining <= 0.0:
                    raise ToolFailureError(f"no worker came free within {patience_seconds:g} seconds")
                self._changed.wait(min(remaining, _GLANCE_SECONDS))  # short, since `cancelled` wakes nobody

    def put(self, worker: Any) -> bool:
        """Lets a worker wait for the next call. False if all are being ended."""
        with self._changed:
            if not self._closed:
                self._idle.append(worker)
                self._changed.notify()
            return not self._closed

    def close(self) -> list[Any]:
        """From now on no worker is given out or taken back. Those that waited."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        return idle


class ThreadWorkers:
    """Workers in threads of this process.

    A thread cannot be killed: one that hangs is left to itself, and closes its worker if it ever comes back; another
    one takes its place at once. Tools that may hang for good should have limits of their own, or be actors.
    """

    def __init__(self, make_worker: Callable[[], Worker], size: int):
        self.num_restarts = 0
        self._make_worker = make_worker
        self._idle = IdleWorkers()
        for _ in range(size):
            self._idle.put(_WorkerThread(self))

    def take(self, patience_seconds: float, cancelled: threading.Event) -> "_WorkerThread | None":
        """See WorkerPool."""
        return self._idle.take(patience_seconds, cancelled)

    def give_back(self, worker: "_WorkerThread") -> None:
        """See WorkerPool."""
        if not self._idle.put(worker):
            worker.end()

    def run(
        self,
        worker: "_WorkerThread",
        arguments: Mapping[str, Any],
        timeout_seconds: float,
        on_end: Callable[[], None],
    ) -> Any:
        """See WorkerPool."""
        future = worker.submit(arguments, on_end)
        try:
            error = future.exception(timeout_seconds)
        except TimeoutError:
            worker.end()
            self.num_restarts += 1
            self.give_back(_WorkerThread(self))
            raise WorkerTimeoutError(f"the call took longer than {timeout_seconds:g} seconds") from None
        self.give_back(worker)
        if error is None:
            return future.result()
        if isinstance(error, ToolMistakeError):
            raise error
        raise ToolFailureError(f"the worker broke: {error!r}") from error

    def close(self) -> None:
        """See WorkerPool. Waits a little for workers that are idle; those at work end after their call."""
        ended = self._idle.close()
        for worker in ended:
            worker.end()
        for worker in ended:
            worker.thread.join(_CLOSING_SECONDS)

    def make(self) -> Worker:
        """A new worker."""
        return self._make_worker()


class _WorkerThread:
    """A thread with a worker, which is made anew whenever it breaks."""

    def __init__(self, pool: ThreadWorkers):
        self._pool = pool
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="tool-worker", daemon=True)
        self.thread.start()

    def submit(self, arguments: Mapping[str, Any], on_end: Callable[[], None]) -> "Future[Any]":
        future: Future[Any] = Future()
        self._jobs.put((future, arguments, on_end))
        return future

    def end(self) -> None:
        """After the call that it is at."""
        self._jobs.put(None)

    def _work(self) -> None:
        worker, broken = self._made()
        while (job := self._jobs.get()) is not None:
            future, arguments, on_end = job
            if worker is None:
                worker, broken = self._made()
            value, error = _called(worker or _Unmade(broken), arguments, on_end)
            if error is None:
                future.set_result(value)
                continue
            future.set_exception(error)
            if worker is not None and not isinstance(error, ToolMistakeError):
                _close(worker)
                self._pool.num_restarts += 1
                worker, broken = self._made()
        if worker is not None:
            _close(worker)

    def _made(self) -> tuple[Worker | None, Exception | None]:
        try:
            return self._pool.make(), None
        except Exception as error:  # told to the next caller, who has a sample to mark as failed
            return None, error


class _Unmade:
    """Stands for a worker that could not be made."""

    def __init__(self, error: Exception):
        self._error = error

    def call(self, arguments: Mapping[str, Any]) -> Any:
        raise self._error

    def close(self) -> None:
        pass


def _called(
    worker: Worker, arguments: Mapping[str, Any], on_end: Callable[[], None]
) -> tuple[Any, BaseException | None]:
    try:
        try:
            return worker.call(arguments), None
        finally:
            on_end()
    except BaseException as error:  # even SystemExit must not end the thread: its caller waits for an answer
        return None, error


def _close(worker: Worker) -> None:
    try:
        worker.close()
    except Exception:  # a broken worker may be unable even to close, which must not keep its successor away
        return
