"""Tokens to text as they come, cut at stop strings. Text that may be the start of a stop string is held back."""

from openmimo.data.tokenizer import StreamDecoder


class TextStream:
    """The text of one growing sequence. `stopped` turns true at the first stop string, which the text leaves out."""

    def __init__(self, decoder: StreamDecoder, stop: tuple[str, ...] = ()):
        self.stopped = False
        self._pieces: list[str] = []
        self._decoder = decoder
        self._stop = stop
        self._held_back = ""
        self._num_taken = 0

    @property
    def text(self) -> str:
        """All text that is certain."""
        return "".join(self._pieces)

    def push(self, token_id: int, *, may_stop: bool = True) -> None:
        """Adds one token. may_stop: whether a stop string that it completes ends the text (or is text like another)."""
        self._release(self._decoder.push([token_id]), may_stop)

    def finish(self) -> None:
        """Ends the text: what was held back belongs to it, unless a stop string was met."""
        self._release(self._decoder.flush(), may_stop=True)
        if not self.stopped:
            self._pieces.append(self._held_back)
            self._held_back = ""

    def take(self) -> str:
        """The text that has become certain since the last call."""
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
        found = [place for place in map(pending.find, self._stop) if place >= 0]
        if found:
            self.stopped = True
            self._pieces.append(pending[: min(found)])
            self._held_back = ""
            return
        certain = len(pending) - max((_overlap(pending, stop) for stop in self._stop), default=0)
        self._pieces.append(pending[:certain])
        self._held_back = pending[certain:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
