"""The reward of `bench_rl` in all processes. Uses only the standard library.

The scorer of the task would give every answer of random weights 0, and no group a gradient.
"""


def digit_share(text: str) -> float:
    """Returns the share of digits among the characters of an answer, 0 for an empty answer."""
    return sum(character in "0123456789" for character in text) / max(1, len(text))
