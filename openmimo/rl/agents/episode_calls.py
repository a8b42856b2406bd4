"""Calls of environments, which are other people's code: in threads of their own, and each with a deadline."""

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
    """A call of an environment did not return in time. The message says where it hangs."""


@dataclass
class _Call:
    function: Callable[[], Any]
    discard: Discard | None
    future: "Future[Any]" = field(default_factory=Future)


class _Thread(threading.Thread):
    """Takes calls from a queue, until it is given up or finds None there."""

    def __init__(self, calls: "queue.SimpleQueue[_Call | None]"):
        super().__init__(name="episode", daemon=True)  # a hung one must not keep the process from ending
        self._calls = calls
        self._lock = threading.Lock()
        self._call: _Call | None = None
        self._began = 0.0
        self._is_given_up = False

    def run(self) -> None:
        """See threading.Thread."""
        while (call := self._calls.get()) is not None:
            if not call.future.set_running_or_notify_cancel():
                continue
            with self._lock:
                self._call, self._began = call, time.monotonic()
            result, error = None, None
            try:
                result = call.function()
            except BaseException as raised:  # SystemExit too: it is the environment's, not the run's
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
        """The future of a call that runs for longer. This thread ends with that call, and its result is discarded."""
        with self._lock:
            if self._call is None or time.monotonic() - self._began < seconds:
                return None
            self._is_given_up = True
            return self._call.future

    def place(self) -> str:
        """The lines of code that the thread is at, the innermost last."""
        frame = sys._current_frames().get(self.ident or 0)
        lines = traceback.extract_stack(frame)[-_SHOWN_LINES:] if frame else []
        return " > ".join(f"{line.filename}:{line.lineno} ({line.name})" for line in lines) or "its end"


class _Lane:
    """A number of threads for one queue of calls. A thread that is given up is replaced."""

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
    """Runs what environments are asked to do: opening, answering, scoring and closing episodes.

    Python cannot end a thread. One whose call is overdue is given up: its call counts as failed, what it returns later
    is discarded, and another thread takes its place. It stays until its call returns; a run with more than
    MAX_HUNG_THREADS of them at once ends, so that they do not use the machine up.

    Args:
        threads: Calls that run side by side; 0: `submit` waits for each call, so that the order of events is always
            the same.
        seconds: How long a call may take, from when it begins.
    """

    def __init__(self, *, threads: int = 0, seconds: float = 300.0):
        self.is_instant = threads == 0
        self._in_turn = _Lane(1, seconds)
        self._side_by_side = _Lane(threads, seconds)

    @property
    def num_hung(self) -> int:
        """Threads whose call was overdue and has not returned yet."""
        return sum(thread.is_alive() for lane in (self._in_turn, self._side_by_side) for thread in lane.hung)

    def submit(self, function: Callable[[], Any], *, discard: Discard | None = None) -> "Future[Any]":
        """The future of function(), done at once if there are no threads. discard: gets a result that is late."""
        if self.is_instant:
            return self.wait_for(function, discard=discard)
        return self._side_by_side.submit(function, discard)

    def wait_for(self, function: Callable[[], Any], *, discard: Discard | None = None) -> "Future[Any]":
        """The future of function(), done. Raises UserError if too many calls hang."""
        future = self._in_turn.submit(function, discard)
        while not future.done():
            wait([future], _GLANCE_SECONDS)
            self.give_up_overdue()
        return future

    def give_up_overdue(self) -> None:
        """Ends the waiting for calls that are overdue. Raises UserError if too many hang."""
        for lane in (self._in_turn, self._side_by_side):
            lane.give_up_overdue()
            lane.hung = [thread for thread in lane.hung if thread.is_alive()]
        if self.num_hung > MAX_HUNG_THREADS:
            hung = [*self._in_turn.hung, *self._side_by_side.hung][-1]
            raise UserError(
                f"{self.num_hung} calls of environments hang and cannot be ended, as Python threads cannot be killed; "
                f"the last one is at {hung.place()}. Give the environment deadlines of its own, or let it do such work "
                "in a child process that it kills."
            )

    def close(self) -> None:
        """Ends the threads after what they have been given, except for those that hang."""
        for lane in (self._in_turn, self._side_by_side):
            lane.give_up_overdue()
            lane.close(_CLOSE_SECONDS if not lane.hung else _GLANCE_SECONDS)
