"""The reward of `bench_rl`, the same function in every process. Standard library alone.

Random weights never sort digits, so the task's own key would give every answer 0 and every group no gradient.
"""


def digit_share(text: str) -> float:
    """The share of an answer's characters that are digits, 0 for an empty answer."""
    return sum(character in "0123456789" for character in text) / max(1, len(text))
