"""The form of a spoken reply while it is generated: which ids of the text channel may follow.

Text and patches alternate by five. `<|eot|>` ends the text, and only then may `<|eostm|>` end the reply. Audio that is
shorter than the text ends after any patch, and the rest of the text follows. The text may be given, so that only the
audio is generated. `SequenceBuilder` builds the same replies for training.
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
        self._given = None if given is None else [token for segment in given for token in segment]
        self._num_text = self._num_patches = 0  # of this segment
        self._has_patches = self._has_ended_text = self._has_ended_audio = False

    @property
    def allows_patch(self) -> bool:
        """Whether `<|empty|>` may follow."""
        is_due = self._has_ended_text or self._num_patches > 0 or self._num_text >= SEGMENT_TOKENS
        return is_due and not self._has_ended_audio and not (self._given and self._is_last_end())

    def allowed(self) -> tuple[int, ...] | None:
        """Return the ids of which one follows; None for any text id or `<|eot|>`, or `<|empty|>` if `allows_patch`."""
        tokens = self._tokens
        patch = (tokens.empty,) if self.allows_patch else ()
        if self._has_ended_text:
            return (*patch, tokens.stream_end)
        allows_text = not patch or self._has_patches
        if self._given is not None:
            return (*patch, self._given[0]) if allows_text else patch
        return None if allows_text else (tokens.text_end, *patch)

    def push(self, token: int) -> None:
        """Add the id that follows."""
        if token == self._tokens.empty:
            self._has_patches = True
            self._num_patches += 1
            if self._num_patches == SEGMENT_PATCHES and not self._has_ended_text:
                self._num_text = self._num_patches = 0
            return
        is_end = token == self._tokens.text_end
        if self._num_patches > 0 or (self._num_text >= SEGMENT_TOKENS and not is_end):
            self._has_ended_audio = True
        self._num_text += 1
        self._has_ended_text = self._has_ended_text or is_end
        if self._given:
            self._given.pop(0)

    def _is_last_end(self) -> bool:
        """Whether `<|eot|>` of a given text follows its segment of tokens, before the patches."""
        return self._given == [self._tokens.text_end] and self._num_patches == 0
