"""A backend whose work is done in a thread of its own, which sends deltas to the event loop.

    event loop                             thread of the steps
    _enqueue(submit)           --work-->   run all queued work, then one step
    delta = await reply.get()  <--reply--  _deliver(deltas of the step)
    _enqueue(abort)            --work-->   free the request's pages before the next step

Only this thread changes the state of the steps.
"""

import asyncio
import collections
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from openmimo.core.errors import UserError
from openmimo.core.records import Delta, Request

_LOG = logging.getLogger(__name__)
_Reply = asyncio.Queue[Delta | UserError]


class Steps(Protocol):
    """Work on several requests in steps. All methods are called in the thread of the backend."""

    @property
    def has_work(self) -> bool:
        """Whether requests are waiting or running."""

    def submit(self, request: Request) -> None:
        """Queue a request. Raises UserError if it can never run."""

    def abort(self, request_id: str) -> None:
        """Release a request, if it is still waiting or running."""

    def step(self) -> list[Delta]:
        """Advance the running requests, and return what they have generated."""


class ThreadedBackend:
    """Runs steps in a thread. No other code may use the steps until `close` returns."""

    def __init__(self, steps: Steps):
        self._steps = steps
        self._work: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = threading.Condition()
        self._is_closing = False
        self._has_died = self._has_ended = False
        self._replies: dict[str, tuple[asyncio.AbstractEventLoop, _Reply]] = {}
        self._thread = threading.Thread(target=self._run, name="openmimo-engine", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """Whether the thread runs and is not about to stop."""
        return not (self._has_died or self._is_closing)

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of a request. Closing the iterator aborts the request."""
        reply: _Reply = asyncio.Queue()
        self._replies[request.id] = (asyncio.get_running_loop(), reply)
        is_whole = False
        try:
            if not self._enqueue(lambda: self._submit(request)):
                reply.put_nowait(_engine_has_ended(request.id))
            while not is_whole:
                delta = await reply.get()
                if isinstance(delta, UserError):
                    is_whole = True
                    raise delta
                is_whole = bool(delta.finish_reason)
                yield delta
        finally:
            try:
                if not is_whole:
                    await asyncio.shield(self._abort(request.id))
            finally:
                del self._replies[request.id]

    async def close(self) -> None:
        """Stop the thread after its current step. The caller keeps the steps."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _enqueue(self, work: Callable[[], None]) -> bool:
        """Queue work for the engine thread. Returns False if the thread has ended."""
        with self._wake:
            self._work.append(work)
            self._wake.notify()
            return not self._has_ended

    async def _abort(self, request_id: str) -> None:
        """Wait until the engine has released the request, or its thread has ended."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def abort() -> None:
            self._steps.abort(request_id)
            loop.call_soon_threadsafe(done.set)

        self._enqueue(abort)
        while self._thread.is_alive():
            try:
                await asyncio.wait_for(done.wait(), timeout=0.5)
                return
            except TimeoutError:
                continue

    # --- in the engine thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._do_work()
                self._deliver(self._steps.step())
        except UserError as error:  # for example, a rank has ended: the message says all
            _LOG.error("the engine has failed: %s", error)
            self._has_died = True
        except BaseException:  # includes panics of native libraries: clients and /health must learn of any failure
            _LOG.exception("the engine has failed")
            self._has_died = True
        with self._wake:
            self._has_ended = True
        self._deliver([_engine_has_ended(request_id) for request_id in list(self._replies)])

    def _wait_for_work(self) -> bool:
        """Sleep until there is work. Returns False if the backend is closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._work or self._steps.has_work or self._is_closing)
            return not self._is_closing

    def _do_work(self) -> None:
        while self._work:
            self._work.popleft()()

    def _submit(self, request: Request) -> None:
        try:
            self._steps.submit(request)
        except UserError as error:
            self._send([(request.id, error)])

    def _deliver(self, deltas: list[Delta]) -> None:
        self._send([(delta.request_id, delta) for delta in deltas])

    def _send(self, events: list[tuple[str, Delta | UserError]]) -> None:
        """Pass all events of a step to the event loops, waking each loop once."""
        events_by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Reply, Delta | UserError]]] = {}
        for request_id, event in events:
            destination = self._replies.get(request_id)
            if destination is not None:
                loop, reply = destination
                events_by_loop.setdefault(loop, []).append((reply, event))
        for loop, replies in events_by_loop.items():
            loop.call_soon_threadsafe(_put_all, replies)


def _engine_has_ended(request_id: str) -> Delta:
    return Delta(request_id, finish_reason="error", error="the engine has stopped; the server's log has the reason")


def _put_all(events: list[tuple[_Reply, Delta | UserError]]) -> None:
    for reply, event in events:
        reply.put_nowait(event)
