"""What a request costs before the engine sees it (parsing, templates, tokens, grammars), in a few threads."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from openmimo.engine.server.errors import ApiError

_Result = TypeVar("_Result")


class Lane:
    """A few threads, and a bounded queue in front of them.

    Work that runs cannot be stopped, so its thread stays taken when the client goes away; work that waits is forgotten.
    """

    def __init__(self, name: str, *, num_threads: int, most_waiting: int, retry_after_seconds: int):
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=f"openmimo-{name}")
        self._free = asyncio.Semaphore(num_threads)
        self._most_waiting = most_waiting
        self._num_waiting = 0
        self._retry_after_seconds = retry_after_seconds

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`. Raises what it raises, and ApiError (429) if too much waits already."""
        if self._num_waiting >= self._most_waiting:
            raise ApiError(
                429,
                f"{self._num_waiting} requests wait to be read already; try again.",
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
        """Returns when the work that runs has ended."""
        self._executor.shutdown()
