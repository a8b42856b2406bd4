"""Errors of texts, and intervals of fractions."""

import random
import re
import unicodedata
from collections.abc import Sequence

from openmimo.evals.audio.task import Fraction
from openmimo.evals.task import wilson_interval

_RESAMPLES = 1000


def normalized(text: str) -> str:
    """Return a text in small letters without punctuation, with single spaces, as error rates are measured."""
    letters = unicodedata.normalize("NFKC", text).lower()
    return " ".join(re.sub(r"[^\w']+", " ", letters).split())


def edit_distance(found: Sequence[str], reference: Sequence[str]) -> int:
    """Return the least number of insertions, deletions and substitutions between two sequences."""
    row = list(range(len(reference) + 1))
    for number, item in enumerate(found, start=1):
        diagonal, row[0] = row[0], number
        for place, expected in enumerate(reference, start=1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (item != expected))
    return row[-1]


def text_errors(found: str, reference: str) -> dict[str, Fraction]:
    """Return the word and character error rates of a text, and a score: 1 minus the word error rate, at least 0."""
    found, reference = normalized(found), normalized(reference)
    words = reference.split()
    num_wrong = edit_distance(found.split(), words)
    return {
        "score": (max(0.0, 1.0 - num_wrong / max(len(words), 1)), 1.0),
        "word_errors": (num_wrong, len(words)),
        "character_errors": (edit_distance(found.replace(" ", ""), reference.replace(" ", "")), len("".join(words))),
    }


def fraction_interval(fractions: Sequence[Fraction], *, is_share: bool = False) -> tuple[float, float, float]:
    """Return the sum of the numerators by the sum of the denominators, and its 95 % interval.

    The interval is Wilson's for shares of examples, and a bootstrap over the examples for other fractions.
    """
    value = _ratio(fractions)
    if is_share and all(fraction in ((0.0, 1.0), (1.0, 1.0)) for fraction in fractions):
        return value, *wilson_interval(value, len(fractions))
    draw = random.Random(0)
    ratios = sorted(_ratio(draw.choices(fractions, k=len(fractions))) for _ in range(_RESAMPLES))
    low, high = ratios[int(0.025 * _RESAMPLES)], ratios[int(0.975 * _RESAMPLES) - 1]
    return value, min(low, value), max(high, value)


def _ratio(fractions: Sequence[Fraction]) -> float:
    return sum(one for one, _ in fractions) / max(sum(count for _, count in fractions), 1e-12)
