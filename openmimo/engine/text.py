"""Streaming detokenization up to a stop string. Text that may begin a stop string is held back."""

from openmimo.data.tokenizer import StreamDecoder


class TextStream:
    """The text of one growing sequence.

    Attributes:
        stopped: Whether a stop string was found. The text ends before it.
        stop_string: The stop string that was found, or empty.
    """

    def __init__(self, decoder: StreamDecoder, stop: tuple[str, ...] = ()):
        self.stopped = False
        self.stop_string = ""
        self._pieces: list[str] = []
        self._decoder = decoder
        self._stop = stop
        self._held_back = ""
        self._num_taken = 0

    @property
    def text(self) -> str:
        """All text that is not held back."""
        return "".join(self._pieces)

    def push(self, token_id: int, *, may_stop: bool = True) -> None:
        """Adds one token. If `may_stop` is false, a stop string that it completes is ordinary text."""
        self._release(self._decoder.push([token_id]), may_stop)

    def finish(self) -> None:
        """Ends the text. Held-back text is added, unless a stop string was found."""
        self._release(self._decoder.flush(), may_stop=True)
        if not self.stopped:
            self._pieces.append(self._held_back)
            self._held_back = ""

    def take(self) -> str:
        """The text that was added since the last call."""
        piece = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return piece

    def _release(self, new_text: str, may_stop: bool) -> None:
        if self.stopped:
            return
        pending = self._held_back + new_text
        if not may_stop:
            self._pieces.append(pending)
            self._held_back = ""
            return
        found = [(index, stop) for stop in self._stop if (index := pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            index, self.stop_string = min(found)
            self._pieces.append(pending[:index])
            self._held_back = ""
            return
        certain = len(pending) - max((_overlap(pending, stop) for stop in self._stop), default=0)
        self._pieces.append(pending[:certain])
        self._held_back = pending[certain:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
