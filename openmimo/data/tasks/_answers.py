"""Comparison of an answer with its key: as text, as a number, or as mathematics. No text raises."""

import importlib.util
import math
import re
from fractions import Fraction

from openmimo.core.errors import ConfigError
from openmimo.data.task import final_answer
from openmimo.runtime.isolated.calls import Call, isolated_calls

METHODS = ("exact", "contains", "numeric", "math")

MATH_SECONDS = 5.0
MAX_MATH_CHARACTERS = 10_000

# A sign belongs to a number only if no word or bracket ends right before it: in 10-5 the last number is 5.
_NUMBER = re.compile(r"(?:(?<![\w.)\]])[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?:\s*/\s*\d+)?")


def normalized(text: str) -> str:
    """Return the text in lower case, with single spaces and without a final period."""
    return " ".join(text.casefold().split()).removesuffix(".").strip()


def last_number(text: str) -> Fraction | None:
    """Return the last number in `text`: an integer, a decimal (commas may group digits) or a fraction like 3/4."""
    found = _NUMBER.findall(text[-1000:])
    if not found:
        return None
    numerator, _, denominator = found[-1].replace(",", "").partition("/")
    try:
        return Fraction(numerator.strip()) / Fraction(denominator.strip() or 1)
    except (ValueError, ZeroDivisionError):
        return None


def score_answer(method: str, answer: str, text: str, *, tolerance: float = 0.0) -> float:
    """Return 1.0 if `text` gives `answer`, else 0.0.

    Args:
        method: "exact" compares the normalized texts. "contains" searches the text for the normalized answer as whole
            words. "numeric" compares the last numbers of both. "math" compares both with math-verify, in a child
            process with a deadline.
        answer: The key.
        text: The policy's output. Text before the end of its thinking is ignored.
        tolerance: For "numeric": maximum relative difference. A key that is an integer must be matched exactly.

    Raises:
        ConfigError: The method is unknown, or math-verify is not installed.
    """
    text = final_answer(text)
    if method == "exact":
        return float(normalized(text) == normalized(answer))
    if method == "contains":
        return float(bool(re.search(rf"(?<!\w){re.escape(normalized(answer))}(?!\w)", normalized(text))))
    if method == "numeric":
        return float(_numbers_agree(last_number(answer), last_number(text), tolerance))
    if method == "math":
        return _math_score(answer, text)
    raise ConfigError(f"There is no scoring {method!r}; it must be one of {', '.join(METHODS)}.")


def check_method(method: str) -> None:
    """Raise ConfigError if `method` is unknown or its library is not installed."""
    if method not in METHODS:
        raise ConfigError(f"There is no scoring {method!r}; it must be one of {', '.join(METHODS)}.")
    if method == "math" and not _has_math_verify():
        raise ConfigError("Scoring 'math' needs the package math-verify: pip install math-verify")


def is_instant(method: str) -> bool:
    """Return whether scoring takes microseconds. Otherwise it waits for a child process."""
    return method != "math"


def math_verify(answer: str, text: str) -> float:
    """Return 1.0 if math-verify finds answer and text mathematically equal, else 0.0.

    math-verify passes the text to sympy, which may evaluate it: run this function in an isolated process.
    """
    from math_verify import parse, verify

    # The library's time limits use alarm signals; they are off because the process has a deadline.
    expected = parse(f"${answer}$", parsing_timeout=None)
    parsed = parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)
    return float(verify(expected, parsed, timeout_seconds=None))


def _numbers_agree(expected: Fraction | None, actual: Fraction | None, tolerance: float) -> bool:
    if expected is None or actual is None:
        return False
    if expected == actual or expected.denominator == 1 or not tolerance:
        return expected == actual
    try:
        return math.isclose(expected, actual, rel_tol=tolerance)
    except OverflowError:
        return False


def _has_math_verify() -> bool:
    try:
        return importlib.util.find_spec("math_verify") is not None
    except ValueError:  # the module was imported without a spec
        return False


def _math_score(answer: str, text: str) -> float:
    check_method("math")
    call = Call(f"{__name__}:math_verify", (answer, text[-MAX_MATH_CHARACTERS:]))
    prepare = Call(f"{__name__}:math_verify", (answer, answer))
    return isolated_calls().run(call, seconds=MATH_SECONDS, prepare=prepare).value or 0.0
