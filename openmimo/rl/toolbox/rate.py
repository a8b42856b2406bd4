"""A token bucket: so many calls a second on average, and a few at once after a pause."""

import threading
import time
from collections.abc import Callable


class TokenBucket:
    """Tells each caller how long to wait, first come first served. `clock` gives seconds."""

    def __init__(self, calls_per_second: float, burst: int = 1, clock: Callable[[], float] = time.monotonic):
        self._rate, self._burst, self._clock = calls_per_second, burst, clock
        self._tokens, self._filled = float(burst), clock()
        self._lock = threading.Lock()

    def reserve(self, patience_seconds: float) -> float | None:
        """Takes a token, now or of the future: the seconds until it is there. None, taking none, if beyond patience."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._rate)
            self._filled = now
            wait = max(0.0, (1.0 - self._tokens) / self._rate)
            if wait > patience_seconds:
                return None
            self._tokens -= 1.0
            return wait
