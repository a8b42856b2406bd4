"""Long text in pieces that are tokenized one by one. Time and memory are then bounded by the piece.

There are two ways to cut, with different promises:

    text_pieces   the tokens of the pieces join to the tokens of the text, always; a piece may be long
    cut_text      a piece is never longer than its limit; the tokens may differ where no place fits within the limit

Both cut where byte-level BPE begins a word and Unicode normalization composes nothing.
"""

import re
import unicodedata
from collections.abc import Iterator

MOST_CHARACTERS = 32_768  # in a piece of cut_text
PIECE_CHARACTERS = 2**16  # in a piece of text_pieces, roughly
_WINDOW_CHARACTERS = 2**17
# After a line end or before a space, with a printed character on both sides.
_PLACES = (re.compile(r"(?<=\S)\r?\n(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))
# Before a space between two words, or after a single line end between two characters that are not blank. The patterns
# of GPT-2, Qwen2 and Llama 3 always begin a word there.
_CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=\S)")


def cut_text(text: str, most_characters: int = MOST_CHARACTERS) -> Iterator[str]:
    """Yields pieces of at most `most_characters` that join to `text`.

    A piece without a line end or a space in its second half is cut at the limit (but not before a combining accent).
    Only there, the ids may differ from those of the whole text.
    """
    start = 0
    while len(text) - start > most_characters:
        end = _last_place(text, start + most_characters // 2, start + most_characters)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _last_place(text: str, earliest: int, latest: int) -> int:
    """The last place to cut at, with earliest < place <= latest."""
    for pattern in _PLACES:
        places = [match.end() for match in pattern.finditer(text, earliest, latest + 1)]
        places = [place for place in places if earliest < place <= latest]
        if places:
            return places[-1]
    unmarked = (place for place in range(latest, earliest, -1) if unicodedata.category(text[place])[0] != "M")
    return next(unmarked, latest)


def text_pieces(text: str) -> Iterator[str]:
    """Yields pieces that join to `text` and whose tokens join to its tokens.

    A piece has at least `PIECE_CHARACTERS`, except the last, and more where the text has no place to cut.
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


def utf8_length(text: str) -> int:
    """Bytes of `text` in UTF-8, without a copy of the whole."""
    return len(text) if text.isascii() else sum(len(part.encode()) for part in blocks(text))


def blocks(text: str) -> Iterator[str]:
    """`text` in blocks of equal length, wherever they end."""
    return (text[start : start + MOST_CHARACTERS] for start in range(0, len(text), MOST_CHARACTERS))
