"""The engine as the server's backend: it steps in a thread of its own, and replies cross over to the event loop.

The thread alone changes the engine's state (`check` changes nothing but the compiler of structures, which makes each
grammar once). The event loop hands it work (submit, abort) through a queue that it
empties before each step, and gets back what each step added. So a client that goes away frees its pages before the
next step.
"""

import asyncio
import collections
import logging
import threading
from collections.abc import AsyncGenerator, Callable

from openmimo.core.errors import UserError
from openmimo.core.records import Delta, Request
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.engine import Engine
from openmimo.engine.server.backends.protocol import BackendGauges

_LOG = logging.getLogger(__name__)
_Reply = asyncio.Queue[Delta | UserError]


class EngineBackend:
    """Serves an engine, which nobody else may step meanwhile. model_name: what clients call it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, model_name: str):
        self.model_name = model_name
        self.tokenizer = tokenizer
        self.max_positions = engine.model.config.max_positions
        self._engine = engine
        self._work: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = threading.Condition()
        self._is_closing = False
        self._has_died = self._has_ended = False
        self._replies: dict[str, tuple[asyncio.AbstractEventLoop, _Reply]] = {}
        self._thread = threading.Thread(target=self._run, name="openmimo-engine", daemon=True)
        self._thread.start()

    def check(self, request: Request) -> None:
        """Raises UserError if the request can never run. May be called from any thread."""
        self._engine.check(request)  # reads what never changes; the compiler of structures has a lock

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The reply, one delta for each step that adds to it. Closing the iterator aborts it and frees its pages."""
        reply: _Reply = asyncio.Queue()
        self._replies[request.id] = (asyncio.get_running_loop(), reply)
        is_whole = False
        try:
            if not self._do(lambda: self._submit(request)):
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

    def gauges(self) -> BackendGauges:
        """What /metrics and /health report."""
        engine, stats = self._engine, self._engine.stats
        return BackendGauges(
            num_waiting=engine.num_waiting,
            num_running=engine.num_running,
            cache_bytes_used=engine.arena.num_used * engine.arena.page_bytes,
            cache_bytes_total=engine.arena.num_pages * engine.arena.page_bytes,
            num_prompt_tokens=stats.num_prompt_tokens + stats.num_cached_tokens,
            num_cached_tokens=stats.num_cached_tokens,
            num_new_tokens=stats.num_new_tokens,
            drafts_offered=tuple(stats.offered),
            drafts_accepted=tuple(stats.accepted),
            is_healthy=not (self._has_died or self._is_closing),
        )

    async def close(self) -> None:
        """Ends the thread after the step that runs; the engine itself stays the caller's."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _do(self, work: Callable[[], None]) -> bool:
        """Hands work to the engine's thread; False where that has ended."""
        with self._wake:
            self._work.append(work)
            self._wake.notify()
            return not self._has_ended

    async def _abort(self, request_id: str) -> None:
        """Returns when the engine has let go of the request (at once where its thread has ended)."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def abort() -> None:
            self._engine.abort(request_id)
            loop.call_soon_threadsafe(done.set)

        self._do(abort)
        while self._thread.is_alive():
            try:
                await asyncio.wait_for(done.wait(), timeout=0.5)
                return
            except TimeoutError:
                continue

    # --- in the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._do_work()
                self._deliver([sequence.take_delta() for sequence in self._engine.step()])
        except BaseException:  # a panic of a library too: clients must hear of it, and /health must tell
            _LOG.exception("the engine has died")
            self._has_died = True
        with self._wake:
            self._has_ended = True
        self._deliver([_engine_has_ended(request_id) for request_id in list(self._replies)])

    def _wait_for_work(self) -> bool:
        """Whether to go on; sleeps while there is nothing to do."""
        with self._wake:
            self._wake.wait_for(lambda: self._work or self._engine.has_work or self._is_closing)
            return not self._is_closing

    def _do_work(self) -> None:
        while self._work:
            self._work.popleft()()

    def _submit(self, request: Request) -> None:
        try:
            self._engine.submit(request)
        except UserError as error:
            self._hand_over([(request.id, error)])

    def _deliver(self, deltas: list[Delta]) -> None:
        self._hand_over([(delta.request_id, delta) for delta in deltas])

    def _hand_over(self, events: list[tuple[str, Delta | UserError]]) -> None:
        """Wakes each event loop once for all events of a step."""
        of_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Reply, Delta | UserError]]] = {}
        for request_id, event in events:
            known = self._replies.get(request_id)
            if known is not None:
                loop, reply = known
                of_loop.setdefault(loop, []).append((reply, event))
        for loop, replies in of_loop.items():
            loop.call_soon_threadsafe(_put_all, replies)


def _engine_has_ended(request_id: str) -> Delta:
    return Delta(request_id, finish_reason="error", error="the engine has ended; the server's log says why")


def _put_all(events: list[tuple[_Reply, Delta | UserError]]) -> None:
    for reply, event in events:
        reply.put_nowait(event)
