"""Environments of episodes that are created in advance, such as working folders or running applications."""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from openmimo.rl.toolbox.records import ToolFailureError

Thing = TypeVar("Thing")
_RETRY_SECONDS = 0.5


class WarmEnvironments(Generic[Thing]):
    """Keeps `warm` environments ready. Each serves one episode and is closed afterwards.

    Args:
        make: Creates an environment. Called from any thread.
        close: Closes an environment. Called from any thread.
        warm: Number of environments to keep ready.
        most: Maximum number of environments in use (0: no limit). A limit below the number of episode threads can cause
            a deadlock: all threads may wait for an episode that has no thread.
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
        """Takes a ready environment or creates one. Raises ToolFailureError if none becomes available in time."""
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
        """Closes a taken environment and frees its place."""
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
        """Closes the ready environments. Those in use are closed when they are returned."""
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
            except Exception:  # `take` then fails in a thread that can report the error
                time.sleep(_RETRY_SECONDS)
                continue
            with self._changed:
                self._ready.append(thing)
                self._changed.notify_all()
