"""Calls of environments, which may be external code, in separate threads and with deadlines."""

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from openmimo.core.errors import UserError

MAX_HUNG_THREADS = 16
_GLANCE_SECONDS = 0.05
_CLOSE_SECONDS = 30.0
_SHOWN_LINES = 4

Discard = Callable[[Any], None]


class EpisodeTimeoutError(Exception):
    """A call of an environment timed out. The message says where it hangs."""


@dataclass
class _Call:
    function: Callable[[], Any]
    discard: Discard | None
    future: "Future[Any]" = field(default_factory=Future)


class _Thread(threading.Thread):
    """Executes calls from a queue until it is abandoned or receives None."""

    def __init__(self, calls: "queue.SimpleQueue[_Call | None]"):
        super().__init__(name="episode", daemon=True)  # a hung thread must not keep the process alive
        self._calls = calls
        self._lock = threading.Lock()
        self._call: _Call | None = None
        self._began = 0.0
        self._is_given_up = False

    def run(self) -> None:
        """Run calls from the queue until it yields None."""
        while (call := self._calls.get()) is not None:
            if not call.future.set_running_or_notify_cancel():
                continue
            with self._lock:
                self._call, self._began = call, time.monotonic()
            result, error = None, None
            try:
                result = call.function()
            except BaseException as raised:  # including SystemExit, which must not end the run
                error = raised
            with self._lock:
                self._call = None
                is_late = self._is_given_up
            if is_late:
                if error is None and call.discard is not None:
                    call.discard(result)
                return
            if error is None:
                call.future.set_result(result)
            else:
                call.future.set_exception(error)

    def give_up_after(self, seconds: float) -> "Future[Any] | None":
        """Abandons a call that runs longer; returns its future. The thread ends after the call and drops its result."""
        with self._lock:
            if self._call is None or time.monotonic() - self._began < seconds:
                return None
            self._is_given_up = True
            return self._call.future

    def place(self) -> str:
        """The current stack of the thread, innermost frame last."""
        frame = sys._current_frames().get(self.ident or 0)
        lines = traceback.extract_stack(frame)[-_SHOWN_LINES:] if frame else []
        return " > ".join(f"{line.filename}:{line.lineno} ({line.name})" for line in lines) or "no frame"


class _Lane:
    """Threads that share one queue of calls. An abandoned thread is replaced."""

    def __init__(self, num_threads: int, seconds: float):
        self._num_threads, self._seconds = num_threads, seconds
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads: list[_Thread] = []
        self.hung: list[_Thread] = []

    def submit(self, function: Callable[[], Any], discard: Discard | None) -> "Future[Any]":
        call = _Call(function, discard)
        self._calls.put(call)
        if len(self._threads) < self._num_threads:
            self._start()
        return call.future

    def give_up_overdue(self) -> None:
        for thread in list(self._threads):
            future = thread.give_up_after(self._seconds)
            if future is None:
                continue
            self._threads.remove(thread)
            self.hung.append(thread)
            self._start()
            future.set_exception(
                EpisodeTimeoutError(f"it did not return within {self._seconds:g} seconds; it is at {thread.place()}")
            )

    def close(self, patience_seconds: float) -> None:
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + patience_seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = []

    def _start(self) -> None:
        thread = _Thread(self._calls)
        self._threads.append(thread)
        thread.start()


class EpisodeCalls:
    """Runs the calls of environments: opening, responding, scoring and closing episodes.

    Python cannot kill a thread. If a call is overdue, it counts as failed, a later result is discarded, and another
    thread replaces its thread, which lives until the call returns. A run with more than MAX_HUNG_THREADS such threads
    ends, because they consume memory and processor time.

    Args:
        threads: Number of concurrent calls. With 0, `submit` waits for each call, so that the order of events is
            deterministic.
        seconds: Deadline of a call from its begin.
    """

    def __init__(self, *, threads: int = 0, seconds: float = 300.0):
        self.is_instant = threads == 0
        self._in_turn = _Lane(1, seconds)
        self._side_by_side = _Lane(threads, seconds)

    @property
    def num_hung(self) -> int:
        """Threads whose overdue call has not returned."""
        return sum(thread.is_alive() for lane in (self._in_turn, self._side_by_side) for thread in lane.hung)

    def submit(self, function: Callable[[], Any], *, discard: Discard | None = None) -> "Future[Any]":
        """The future of function(); completed if there are no threads. `discard` receives a late result."""
        if self.is_instant:
            return self.wait_for(function, discard=discard)
        return self._side_by_side.submit(function, discard)

    def wait_for(self, function: Callable[[], Any], *, discard: Discard | None = None) -> "Future[Any]":
        """The completed future of function(). Raises UserError if too many calls hang."""
        future = self._in_turn.submit(function, discard)
        while not future.done():
            wait([future], _GLANCE_SECONDS)
            self.give_up_overdue()
        return future

    def give_up_overdue(self) -> None:
        """Fails the futures of overdue calls. Raises UserError if too many calls hang."""
        for lane in (self._in_turn, self._side_by_side):
            lane.give_up_overdue()
            lane.hung = [thread for thread in lane.hung if thread.is_alive()]
        if self.num_hung > MAX_HUNG_THREADS:
            hung = [*self._in_turn.hung, *self._side_by_side.hung][-1]
            raise UserError(
                f"{self.num_hung} calls of environments hang, and Python threads cannot be killed; the last one is at "
                f"{hung.place()}. Add deadlines to the environment, or move such work into a child process that it "
                "kills."
            )

    def close(self) -> None:
        """Ends the threads after their queued calls, except for hung ones."""
        for lane in (self._in_turn, self._side_by_side):
            lane.give_up_overdue()
            lane.close(_CLOSE_SECONDS if not lane.hung else _GLANCE_SECONDS)
