"""Run requests on the backend within the server's limits: a bounded queue, a deadline, a graceful shutdown."""

import asyncio
import functools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from openmimo.core.errors import UserError
from openmimo.core.records import Delta, Request, SamplingParams
from openmimo.engine.server.backends.protocol import Backend
from openmimo.engine.server.backends.speech import SpeechBackend
from openmimo.engine.server.config import ANY, ServerConfig
from openmimo.engine.server.http import limits
from openmimo.engine.server.http.errors import ApiError, engine_failed, invalid
from openmimo.engine.server.http.metrics import Metrics
from openmimo.engine.server.http.open_bytes import OpenBytes

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class _Lane:
    """A small thread pool with a bounded queue.

    Running work cannot be cancelled, so it occupies its thread after the client disconnects. Waiting work is dropped.
    """

    def __init__(self, name: str, *, num_threads: int, most_waiting: int, retry_after_seconds: int):
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=f"openmimo-{name}")
        self._free = asyncio.Semaphore(num_threads)
        self._most_waiting = most_waiting
        self._num_waiting = 0
        self._retry_after_seconds = retry_after_seconds

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """Return the result of `work`. Raises its exceptions, and ApiError (429) if the queue is full."""
        if self._num_waiting >= self._most_waiting:
            raise ApiError(
                429,
                f"{self._num_waiting} requests are already waiting to be parsed; try again.",
                code="queue_full",
                headers={"Retry-After": str(self._retry_after_seconds)},
            )
        self._num_waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._num_waiting -= 1
        loop = asyncio.get_running_loop()
        future = self._executor.submit(work)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free.release))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Wait until the running work has finished."""
        self._executor.shutdown()


class Service:
    """The backend, with the limits of a config applied.

    Attributes:
        backend: Generates the replies.
        config: The limits.
        metrics: Counters and histograms of the server.
        model_name: Model name in the API.
        created: Unix time of the start, in seconds.
        is_draining: Whether new requests are rejected because the server is shutting down.
        num_waiting: Number of replies that wait for their first token.
        open_bytes: The bodies of all open requests, and the sound that was decoded from them.
    """

    def __init__(self, backend: Backend, config: ServerConfig):
        self.backend = backend
        self.config = config
        self.metrics = Metrics(backend)
        self.model_name = config.model_name or backend.model_name
        self.created = int(time.time())
        self.is_draining = False
        self.num_waiting = 0
        most_open = (
            config.max_open_bytes if self.speech is None else max(config.max_open_bytes, limits.OPEN_SOUND_BYTES)
        )
        self.open_bytes = OpenBytes(most_open, retry_after_seconds=config.retry_after_seconds)
        self._generations: set[Generation] = set()
        # Two lanes, so that long documents do not delay chats.
        self._small, self._large = self._lane("small", num_threads=2), self._lane("large", num_threads=1)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names of the model in the API; its own name first."""
        return (self.model_name, *self.config.model_aliases)

    @property
    def speech(self) -> SpeechBackend | None:
        """The backend, if its model hears and speaks."""
        return self.backend if isinstance(self.backend, SpeechBackend) else None

    @property
    def num_active(self) -> int:
        """Number of HTTP requests whose replies are being generated."""
        return len(self._generations)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) if a request names a model other than the served one and its aliases."""
        names = (*self.model_names, *self.backend.model_aliases)
        if name is not None and name not in names and ANY not in names:
            message = f"There is no model {name!r}; this server serves {self.model_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    def refusal(self) -> ApiError | None:
        """Return the error for new requests (503) if the server is draining or the engine has failed, else None."""
        if self.is_draining:
            return ApiError(
                503, "The server is shutting down; try again later.", code="draining", headers=self._retry_after(1)
            )
        if not self.backend.gauges().is_healthy:
            return ApiError(503, "The engine is not running.", code="engine_unhealthy", headers=self._retry_after(1))
        return None

    async def prepared(self, work: Callable[[], _Result], *, is_large: bool) -> _Result:
        """Run `work` in a thread, without blocking the event loop, and return its result.

        Args:
            work: A function that parses, renders, encodes or compiles parts of a request.
            is_large: Whether `work` may take long. Large work has its own queue.

        Raises:
            ApiError: 429 if the queue is full, 503 as in `refusal`, 504 after the request time-out.
        """
        if (refusal := self.refusal()) is not None:
            raise refusal
        try:
            async with asyncio.timeout(self.config.request_timeout_seconds):
                return await (self._large if is_large else self._small).run(work)
        except TimeoutError as error:
            raise ApiError(504, "The request waited too long before it was parsed.", code="timeout") from error

    def check_num_replies(self, num_prompts: int, num_choices: int) -> None:
        """Raise ApiError if one request needs too many replies. Called before any prompt is encoded."""
        num_replies, most = num_prompts * num_choices, self.config.max_choices
        if num_replies > most:
            raise invalid(
                f"The request needs {num_replies} replies (prompts times n); at most {most} are allowed.", "n"
            )

    def check(self, requests: Sequence[Request], *, param: str, structure_param: str) -> None:
        """Raise ApiError (400) if a request can never run. Thread-safe; compiling a grammar may take long.

        Args:
            requests: The engine requests of one HTTP request.
            param: Field of the HTTP request that contains the prompt.
            structure_param: Field of the HTTP request that contains the structure of the reply.
        """
        num_tokens = sum(len(request.prompt_token_ids) for request in requests)
        if num_tokens > limits.REPLY_PROMPT_TOKENS:
            raise invalid(
                f"The prompts of all replies have {num_tokens} tokens in total; at most "
                f"{limits.REPLY_PROMPT_TOKENS} are allowed.",
                "n",
            )
        num_scored = sum(
            len(request.prompt_token_ids) * (1 + request.params.prompt_top_logprobs)
            for request in requests
            if request.params.prompt_logprobs
        )
        if num_scored > limits.SCORED_TOKENS:
            raise invalid(
                f"The request needs {num_scored} log-probabilities of prompts; at most {limits.SCORED_TOKENS} are "
                "allowed. Send fewer prompts at once, or ask for fewer likeliest tokens.",
                param,
            )
        checked: set[int] = set()
        for request in requests:
            if id(request.prompt_token_ids) not in checked:  # the choices of a prompt share it
                checked.add(id(request.prompt_token_ids))
                self._check(request, param, structure_param)

    def start(self, requests: Sequence[Request]) -> "Generation":
        """Start to generate replies to checked requests.

        Raises:
            ApiError: 429 if the queue is full, 503 as in `refusal`.
        """
        if (refusal := self.refusal()) is not None:
            raise refusal
        # A request larger than the whole queue must still be served when the queue is empty.
        if self.num_waiting and self.num_waiting + len(requests) > self.config.max_queue:
            raise ApiError(
                429,
                f"{self.num_waiting} of at most {self.config.max_queue} requests are already waiting; try again.",
                code="queue_full",
                headers=self._retry_after(self.config.retry_after_seconds),
            )
        return Generation(self, requests, self._generations)

    async def drain(self) -> None:
        """Reject new requests and let running ones finish. Fails those that still run after the drain time-out."""
        self.is_draining = True
        deadline = time.monotonic() + self.config.drain_timeout_seconds
        while self.num_active and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.end_all()

    def end_all(self) -> None:
        """Fail all running requests."""
        for generation in tuple(self._generations):
            generation.fail(ApiError(503, "The server shut down before the reply was complete.", code="draining"))

    async def close(self) -> None:
        """Wait until no thread prepares a request."""
        for lane in (self._small, self._large):
            await asyncio.to_thread(lane.close)

    def _lane(self, name: str, *, num_threads: int) -> _Lane:
        return _Lane(
            name,
            num_threads=num_threads,
            most_waiting=self.config.max_queue,
            retry_after_seconds=self.config.retry_after_seconds,
        )

    def _check(self, request: Request, param: str, structure_param: str) -> None:
        num_tokens, positions = len(request.prompt_token_ids), self.backend.max_positions
        if num_tokens >= positions:
            raise invalid(
                f"The prompt has {num_tokens} tokens, but the model has {positions} positions for prompt and reply.",
                param,
                code="context_length_exceeded",
            )
        # Add one field at a time, so that an error names the invalid field.
        params = request.params
        parts = replace(params, structure=None, logit_bias={}, stop_token_ids=())
        self._check_in_backend(request, parts, param)
        parts = replace(parts, stop_token_ids=params.stop_token_ids)
        self._check_in_backend(request, parts, "stop_token_ids")
        parts = replace(parts, logit_bias=params.logit_bias)
        self._check_in_backend(request, parts, "logit_bias")
        if params.structure is not None:
            self._check_in_backend(request, params, structure_param)

    def _check_in_backend(self, request: Request, params: SamplingParams, param: str) -> None:
        try:
            self.backend.check(replace(request, params=params))
        except UserError as error:
            raise invalid(str(error), param) from error

    @staticmethod
    def _retry_after(seconds: int) -> dict[str, str]:
        return {"Retry-After": str(seconds)}


class Generation:
    """The replies to one HTTP request. Generation starts at construction; `close` aborts unfinished replies.

    `deltas` can be iterated once.
    """

    def __init__(self, service: Service, requests: Sequence[Request], running: "set[Generation]"):
        self._service = service
        self._events: asyncio.Queue[tuple[int, Delta] | ApiError] = asyncio.Queue()
        self._num_running = len(requests)
        self._unread = set(range(len(requests)))
        self._arrival = time.monotonic()
        self._failed = False
        self._running = running
        running.add(self)
        timeout = service.config.request_timeout_seconds
        timeout_error = ApiError(504, f"The reply took longer than {timeout:g} s.", code="timeout")
        self._timer = asyncio.get_running_loop().call_later(timeout, self.fail, timeout_error)
        self._meters = [_Meter(service, self._arrival) for _ in requests]
        self._tasks = [asyncio.create_task(self._pump(index, request)) for index, request in enumerate(requests)]
        for task, meter in zip(self._tasks, self._meters, strict=True):
            task.add_done_callback(functools.partial(self._on_done, meter))

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (choice index, delta) in order of arrival. Raises ApiError if a reply cannot be completed."""
        while self._unread:
            event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            index, delta = event
            if index in self._unread:
                if delta.finish_reason:
                    self._unread.remove(index)
                yield event

    def fail(self, error: ApiError) -> None:
        """End all replies with an error."""
        if not self._failed:
            self._failed = True
            self._events.put_nowait(error)
        for task in self._tasks:
            task.cancel()

    def abort(self, index: int) -> None:
        """End one reply that needs no more tokens. `deltas` yields nothing more of it."""
        self._unread.discard(index)
        self._meters[index].finish_reason = "stop"
        self._tasks[index].cancel()

    async def close(self) -> None:
        """Abort unfinished replies, and wait until the backend has released them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pump(self, index: int, request: Request) -> None:
        """Move the deltas of one reply from the backend to the event queue."""
        async with aclosing(self._service.backend.generate(request)) as deltas:
            async for delta in deltas:
                if delta.is_request_error:
                    raise invalid(delta.error, None)
                if delta.finish_reason in ("error", "abort"):
                    raise engine_failed(delta.error or "it aborted the request.")
                if self._events.qsize() >= limits.UNREAD_DELTAS:
                    raise ApiError(503, "The client does not read its reply.", code="client_too_slow")
                self._meters[index].record(delta)
                self._events.put_nowait((index, delta))
                if delta.finish_reason:
                    return
        raise engine_failed("the reply ended without a finish reason.")

    def _on_done(self, meter: "_Meter", task: asyncio.Task[None]) -> None:
        # A done callback, because a task that is cancelled before it starts never runs any of its code.
        meter.end()
        self._num_running -= 1
        if not self._num_running:
            self._timer.cancel()
            self._running.discard(self)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, ApiError):
            self.fail(error)
        elif isinstance(error, UserError):
            self.fail(invalid(str(error), None))
        elif error is not None:
            _LOG.error("the engine failed", exc_info=error)
            self.fail(engine_failed(type(error).__name__))


class _Meter:
    """Metrics of one reply. The reply counts as waiting until its first token."""

    def __init__(self, service: Service, arrival: float):
        self._service = service
        self._arrival = arrival
        self._first = math.nan
        self._last = arrival
        self._num_tokens = 0
        self.finish_reason = "abort"
        self._is_waiting = True
        service.num_waiting += 1

    def record(self, delta: Delta) -> None:
        if delta.has_output:
            self._last = time.monotonic()
            if math.isnan(self._first):
                self._stop_waiting()
                self._first = self._last
                self._service.metrics.seconds_to_first_token.observe(self._first - self._arrival)
            self._num_tokens += delta.num_new_tokens
        self.finish_reason = delta.finish_reason or self.finish_reason

    def end(self) -> None:
        """Record the end of the reply, by completion, failure or abortion."""
        self._stop_waiting()
        metrics = self._service.metrics
        metrics.replies.labels(self.finish_reason).inc()
        if self.finish_reason == "abort":
            return
        metrics.seconds_in_all.observe(time.monotonic() - self._arrival)
        if self._num_tokens > 1:
            metrics.seconds_per_token.observe((self._last - self._first) / (self._num_tokens - 1))

    def _stop_waiting(self) -> None:
        self._service.num_waiting -= self._is_waiting
        self._is_waiting = False
