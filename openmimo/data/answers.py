"""Comparing an answer with its key: as text, as a number, or as mathematics. None of these raises on any text."""

import math
import re
from fractions import Fraction

from openmimo.core.errors import ConfigError

THINK_END = "</think>"
METHODS = ("exact", "contains", "numeric", "math")

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?:\s*/\s*\d+)?")
_RELATIVE_TOLERANCE = 1e-6


def final_answer(text: str) -> str:
    """What the text says after its reasoning, without blanks around it."""
    return text.rpartition(THINK_END)[2].strip()


def exact_score(answer: str, text: str) -> float:
    """1.0 if `text` is the answer, up to blanks around it."""
    return float(final_answer(text) == answer.strip())


def normalised(text: str) -> str:
    """In lower case, blanks made single, without a full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".").strip()


def last_number(text: str) -> Fraction | None:
    """The last number in `text`: an integer, a decimal (commas may group digits) or a fraction like 3/4."""
    found = _NUMBER.findall(text[-1000:])
    if not found:
        return None
    numerator, _, denominator = found[-1].replace(",", "").partition("/")
    try:
        return Fraction(numerator.strip()) / Fraction(denominator.strip() or 1)
    except (ValueError, ZeroDivisionError):
        return None


def score_answer(method: str, answer: str, text: str) -> float:
    """1.0 if `text` gives `answer`, else 0.0.

    method: "exact" compares the normalised texts, "contains" looks for the normalised answer as whole words in the
    text, "numeric" compares the last numbers of both, "math" asks math-verify whether both are the same mathematics.
    Raises ConfigError for another method, and if math-verify is not installed.
    """
    text = final_answer(text)
    if method == "exact":
        return float(normalised(text) == normalised(answer))
    if method == "contains":
        return float(bool(re.search(rf"(?<!\w){re.escape(normalised(answer))}(?!\w)", normalised(text))))
    if method == "numeric":
        return float(_numbers_agree(last_number(answer), last_number(text)))
    if method == "math":
        return _math_score(answer, text)
    raise ConfigError(f"There is no scoring {method!r}; it must be one of {', '.join(METHODS)}.")


def check_method(method: str) -> None:
    """Raises ConfigError if `method` cannot be used here."""
    score_answer(method, "1", "1")


def _numbers_agree(expected: Fraction | None, given: Fraction | None) -> bool:
    if expected is None or given is None:
        return False
    try:
        return expected == given or math.isclose(expected, given, rel_tol=_RELATIVE_TOLERANCE)
    except OverflowError:
        return False


def _math_score(answer: str, text: str) -> float:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError("Scoring 'math' needs the package math-verify: pip install math-verify") from error
    try:
        # no timeouts: they are alarms, which work in the main thread only
        expected = parse(f"${answer}$", parsing_timeout=None)
        given = parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)
        return float(verify(expected, given, timeout_seconds=None))
    except Exception:  # the parser fails in many ways on text that is not mathematics
        return 0.0
