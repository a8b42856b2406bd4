"""The form of a spoken reply while it is generated: which ids of the text channel may follow.

Text and patches alternate by five. `<|eot|>` ends the text, and only then may `<|eostm|>` end the reply. The text may
be given, so that only the audio is generated.
"""

from openmimo.model.audio.sequence import SEGMENT_PATCHES, SEGMENT_TOKENS, AudioTokens


class SpeechForm:
    """The state of one reply, after `<|sostm|>`.

    Args:
        tokens: The special ids.
        given: The segments of a given text, the last one with `<|eot|>`; None if the model writes the text.
    """

    def __init__(self, tokens: AudioTokens, given: list[list[int]] | None = None):
        self._tokens = tokens
        self._given = None if given is None else [list(segment) for segment in given]
        self._num_text = self._num_patches = 0
        self._has_ended_text = False

    def allowed(self) -> tuple[int, ...] | None:
        """Return the ids of which one follows; None for any text id or `<|eot|>`."""
        tokens = self._tokens
        if self._given:
            if self._given[0]:
                return (self._given[0][0],)
        elif not self._has_ended_text and self._num_patches == 0:
            if self._num_text < SEGMENT_TOKENS:
                return None
            return (tokens.text_end, tokens.empty)
        return (tokens.empty, tokens.stream_end) if self._has_ended_text else (tokens.empty,)

    def push(self, token: int) -> None:
        """Add the id that follows."""
        if token == self._tokens.empty:
            self._num_patches += 1
            if self._num_patches == SEGMENT_PATCHES and not self._has_ended_text:
                self._num_text = self._num_patches = 0
                if self._given is not None:
                    self._given.pop(0)
            return
        self._num_text += 1
        self._has_ended_text = self._has_ended_text or token == self._tokens.text_end
        if self._given is not None and self._given[0]:
            self._given[0].pop(0)
