"""A token bucket: an average rate of calls, with a burst after a pause."""

import threading
import time
from collections.abc import Callable


class TokenBucket:
    """Assigns waiting times in order of arrival. `clock` returns seconds."""

    def __init__(self, calls_per_second: float, burst: int = 1, clock: Callable[[], float] = time.monotonic):
        self._rate, self._burst, self._clock = calls_per_second, burst, clock
        self._tokens, self._filled = float(burst), clock()
        self._lock = threading.Lock()

    def reserve(self, patience_seconds: float) -> float | None:
        """Reserves a token. Returns the seconds until it is available, or None (no reservation) if that is too long."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._rate)
            self._filled = now
            wait = max(0.0, (1.0 - self._tokens) / self._rate)
            if wait > patience_seconds:
                return None
            self._tokens -= 1.0
            return wait
