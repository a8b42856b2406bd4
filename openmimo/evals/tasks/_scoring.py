"""Scores of answers in text, by the definitions of the benchmarks."""

import re

from openmimo.evals.task import Example


def references(example: Example) -> tuple[str, ...]:
    """The texts that the answer must contain."""
    return tuple(example.details["references"])


def share_found(example: Example, text: str) -> float:
    """The share of the references in the text, in any case of letters (RULER)."""
    lowered = text.lower()
    return sum(reference.lower() in lowered for reference in references(example)) / len(references(example))


def any_found(example: Example, text: str) -> float:
    """1 if the text contains one of the references, in any case of letters."""
    return float(share_found(example, text) > 0)


def first_number_matches(example: Example, text: str) -> float:
    """1 if the first integer of the text is the answer (InfiniteBench)."""
    found = re.search(r"\d+", text)
    return float(found is not None and found[0] == example.answer)


def last_number_matches(example: Example, text: str) -> float:
    """1 if the last integer of the text is the answer (LongEval)."""
    found = re.findall(r"-?\d+", text)
    return float(bool(found) and found[-1] == example.answer)
