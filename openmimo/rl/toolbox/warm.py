"""Environments of episodes that are made before they are needed, such as working folders or running applications."""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from openmimo.rl.toolbox.records import ToolFailureError

Thing = TypeVar("Thing")
_RETRY_SECONDS = 0.5


class WarmEnvironments(Generic[Thing]):
    """Keeps `warm` environments ready. Each serves one episode and is closed after it, so that none sees another's.

    make(), close(thing): called from any thread. most: environments in use at one time (0: no limit). A limit below
    the number of threads that episodes answer in can make them all wait for an episode that has no thread to go on in.
    """

    def __init__(self, make: Callable[[], Thing], close: Callable[[Thing], None], *, warm: int = 0, most: int = 0):
        self.num_made = self.num_warm_hits = self.num_in_use = 0
        self._make, self._close_one = make, close
        self._warm, self._most, self._closed = warm, most, False
        self._ready: list[Thing] = []
        self._changed = threading.Condition()
        self._filler = threading.Thread(target=self._fill, name="warm-environments", daemon=True)
        if warm:
            self._filler.start()

    def take(self, patience_seconds: float) -> Thing:
        """An environment of one's own, ready or made now. Raises ToolFailureError if none comes free in time."""
        with self._changed:
            free = self._changed.wait_for(
                lambda: self._closed or not self._most or self.num_in_use < self._most, patience_seconds
            )
            if self._closed or not free:
                reason = "are closed" if self._closed else f"had none free within {patience_seconds:g} seconds"
                raise ToolFailureError(f"the environments {reason}")
            self.num_in_use += 1
            if self._ready:
                self.num_warm_hits += 1
                self._changed.notify_all()
                return self._ready.pop()
        try:
            return self._made()
        except BaseException:
            self._free()
            raise

    def give_back(self, thing: Thing) -> None:
        """Closes an environment that was taken, and lets the next one in."""
        try:
            self._close_one(thing)
        finally:
            self._free()

    def metrics(self) -> dict[str, float]:
        """Counters: made, warm hits, in use, ready."""
        with self._changed:
            return {
                "environments/made": float(self.num_made),
                "environments/warm_hits": float(self.num_warm_hits),
                "environments/in_use": float(self.num_in_use),
                "environments/ready": float(len(self._ready)),
            }

    def close(self) -> None:
        """Closes those that are ready; those in use are closed when they are given back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._warm:
            self._filler.join()
        for thing in self._ready:
            self._close_one(thing)
        self._ready = []

    def _made(self) -> Thing:
        thing = self._make()
        with self._changed:
            self.num_made += 1
        return thing

    def _free(self) -> None:
        with self._changed:
            self.num_in_use -= 1
            self._changed.notify_all()

    def _fill(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._warm)
                if self._closed:
                    return
            try:
                thing = self._made()
            except Exception:  # `take` meets the failure in a thread that can report it
                time.sleep(_RETRY_SECONDS)
                continue
            with self._changed:
                self._ready.append(thing)
                self._changed.notify_all()
