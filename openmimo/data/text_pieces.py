"""Long text in pieces that are tokenized one by one, so that time and memory are bounded by the piece."""

import re
from collections.abc import Iterator

PIECE_CHARACTERS = 2**16
_WINDOW_CHARACTERS = 2**17
# Before a space between two words, or after a single line end between two characters that are not blank. The patterns
# of byte-level tokenizers (GPT-2, Qwen2, Llama 3) always begin a word there, and NFC composes nothing across it.
_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\S)")


def text_pieces(text: str) -> Iterator[str]:
    """Pieces that join to `text` and whose tokens join to its tokens.

    A piece has some `PIECE_CHARACTERS`, or more where the text has no place to cut it.
    """
    start = 0
    while len(text) - start > 2 * PIECE_CHARACTERS:
        end = _next_cut(text, start + PIECE_CHARACTERS)
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def _next_cut(text: str, position: int) -> int:
    """The first place to cut at or after `position`; the end of the text where there is none."""
    # In windows: one search holds the interpreter for as long as it lasts.
    while position < len(text):
        found = _CUT.search(text, position, position + _WINDOW_CHARACTERS)
        if found is not None:
            return found.start()
        position += _WINDOW_CHARACTERS - 2
    return len(text)
