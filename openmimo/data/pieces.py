"""Long texts in pieces: what is encoded at once is bounded, and the ids stay those of the whole text.

A cut goes where byte-level BPE of MiMo's kind splits a text before it merges: after a line end or before a blank, with
something printed on both sides. Unicode normalization joins nothing there either.
"""

import re
import unicodedata
from collections.abc import Iterator

PIECE_CHARACTERS = 32_768
_PLACES = (re.compile(r"(?<=\S)\r?\n(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))


def cut_text(text: str, most_characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """The pieces of `text` in order, each of at most `most_characters`; together they are the text.

    A piece of which the second half holds neither a line end nor a blank to cut at is cut where it is full (before the
    letter of an accent that would be left alone). There, and only there, the ids may differ from the whole text's.
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


def utf8_length(text: str) -> int:
    """Bytes of `text` in UTF-8, without a copy of the whole."""
    return len(text) if text.isascii() else sum(len(part.encode()) for part in blocks(text))


def blocks(text: str) -> Iterator[str]:
    """`text` in blocks of equal length, wherever they end."""
    return (text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS))
