"""Warm workers of one tool: started before the first call, and replaced when they fail or hang."""

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
    """Executes the calls of a tool, one at a time."""

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """The result of a call. Raises ToolMistakeError for mistakes of the model. Other errors replace it."""
        ...

    def close(self) -> None:
        """Releases its resources."""
        ...


class WorkerPool(Protocol):
    """The workers of one tool: threads of this process, or actors."""

    num_restarts: int

    def take(self, patience_seconds: float, cancelled: threading.Event) -> Any:
        """Takes a worker; None if `cancelled` is set first. Raises ToolFailureError if none becomes free."""
        ...

    def give_back(self, worker: Any) -> None:
        """Returns a taken worker that was not run."""
        ...

    def run(self, worker: Any, arguments: Mapping[str, Any], timeout_seconds: float, on_end: Callable[[], None]) -> Any:
        """Runs a taken worker, then returns or replaces it. `on_end` is called when the call has completely ended.

        Raises:
            ToolMistakeError: The model made a mistake.
            WorkerTimeoutError: The call timed out.
            ToolFailureError: The call failed otherwise.
        """
        ...

    def close(self) -> None:
        """Stops all workers."""
        ...


class IdleWorkers:
    """The idle workers of a pool."""

    def __init__(self) -> None:
        self._idle: list[Any] = []
        self._closed = False
        self._changed = threading.Condition()

    def take(self, patience_seconds: float, cancelled: threading.Event) -> Any:
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
                    raise ToolFailureError(f"no worker became free within {patience_seconds:g} seconds")
                self._changed.wait(
                    min(remaining, _GLANCE_SECONDS)
                )  # short, because `cancelled` does not notify this condition

    def put(self, worker: Any) -> bool:
        """Adds an idle worker. Returns False if the pool is closed."""
        with self._changed:
            if not self._closed:
                self._idle.append(worker)
                self._changed.notify()
            return not self._closed

    def close(self) -> list[Any]:
        """Closes the pool for taking and adding. Returns the idle workers."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        return idle


class ThreadWorkers:
    """Workers in threads of this process.

    A thread cannot be killed. A hanging thread is abandoned and replaced immediately; it closes its worker if it
    returns. Tools that may hang forever should have limits of their own, or be actors.
    """

    def __init__(self, make_worker: Callable[[], Worker], size: int):
        self.num_restarts = 0
        self._make_worker = make_worker
        self._idle = IdleWorkers()
        for _ in range(size):
            self._idle.put(_WorkerThread(self))

    def take(self, patience_seconds: float, cancelled: threading.Event) -> "_WorkerThread | None":
        return self._idle.take(patience_seconds, cancelled)

    def give_back(self, worker: "_WorkerThread") -> None:
        if not self._idle.put(worker):
            worker.end()

    def run(
        self,
        worker: "_WorkerThread",
        arguments: Mapping[str, Any],
        timeout_seconds: float,
        on_end: Callable[[], None],
    ) -> Any:
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
        raise ToolFailureError(f"the worker failed: {error!r}") from error

    def close(self) -> None:
        """Stops the workers: idle ones now, busy ones after their call."""
        ended = self._idle.close()
        for worker in ended:
            worker.end()
        for worker in ended:
            worker.thread.join(_CLOSING_SECONDS)

    def make(self) -> Worker:
        """Creates a worker."""
        return self._make_worker()


class _WorkerThread:
    """A thread with a worker, which is recreated after a failure."""

    def __init__(self, pool: ThreadWorkers):
        self._pool = pool
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="tool-worker", daemon=True)
        self.thread.start()

    def submit(self, arguments: Mapping[str, Any], on_end: Callable[[], None]) -> "Future[Any]":
        future: Future[Any] = Future()
        self._jobs.put((future, arguments, on_end))
        return future

    def end(self) -> None:
        """Ends the thread after its current call."""
        self._jobs.put(None)

    def _work(self) -> None:
        worker, broken = self._made()
        while (job := self._jobs.get()) is not None:
            future, arguments, on_end = job
            if worker is None:
                worker, broken = self._made()
            value, error = _called(worker or _Unmade(broken or RuntimeError("no worker")), arguments, on_end)
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
        except Exception as error:  # reported to the next caller, who marks its sample as failed
            return None, error


class _Unmade:
    """Replaces a worker whose creation failed."""

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
    except BaseException as error:  # even SystemExit must not end the thread, because its caller waits for the result
        return None, error


def _close(worker: Worker) -> None:
    try:
        worker.close()
    except Exception:  # a failed worker may also fail to close, which must not prevent its replacement
        return
