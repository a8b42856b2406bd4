"""The sound of earlier replies, which later messages refer to by id. In memory, bounded in size and in time."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from openmimo.engine.server.backends.speech import Clip
from openmimo.engine.server.http import limits


@dataclass(frozen=True)
class SpokenReply:
    """A reply.

    Attributes:
        clip: Its sound.
        transcript: Its text.
        expires_at: Unix time in seconds until which the store keeps it, if it has room.
    """

    clip: Clip
    transcript: str
    expires_at: int


class SpeechStore:
    """The newest replies. Everyone who knows an id may refer to it.

    Args:
        max_bytes: Maximum size of all sound.
        seconds: Time for which a reply is kept.
        clock: Returns the Unix time in seconds.
    """

    def __init__(
        self,
        max_bytes: int = limits.STORED_SPEECH_BYTES,
        seconds: int = limits.STORED_SPEECH_SECONDS,
        clock: Callable[[], float] = time.time,
    ):
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._clock = clock
        self._num_bytes = 0
        self._replies: OrderedDict[str, SpokenReply] = OrderedDict()  # the oldest first

    def expiry(self) -> int:
        """Return the time until which a reply that is stored now is kept."""
        return int(self._clock()) + self._seconds

    def put(self, reply_id: str, clip: Clip, transcript: str) -> None:
        """Keep a reply, in place of the oldest ones."""
        self._replies[reply_id] = SpokenReply(clip, transcript, self.expiry())
        self._num_bytes += clip.waveform.nbytes
        while self._replies and (self._num_bytes > self._max_bytes or self._oldest_has_expired()):
            self._num_bytes -= self._replies.popitem(last=False)[1].clip.waveform.nbytes

    def get(self, reply_id: str) -> SpokenReply | None:
        """Return a reply, or None if it is unknown or has expired."""
        reply = self._replies.get(reply_id)
        return None if reply is None or reply.expires_at < self._clock() else reply

    def _oldest_has_expired(self) -> bool:
        return next(iter(self._replies.values())).expires_at < self._clock()


def new_reply_id() -> str:
    """Return a new id of a reply's sound."""
    return f"audio_{secrets.token_hex(12)}"
