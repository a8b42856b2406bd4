"""InfiniteBench Math.Calc: the results of a long sum, operation by operation (2402.13718). The wording is ours."""

import random
import re

from openmimo.core.records import Message
from openmimo.evals.task import Example, NoOptions, Room, Seed, Task

_LEAST_TERMS = 2


def example(options: NoOptions, room: Room, seed: Seed) -> Example:
    """A sum whose results after each operation are asked for. The answer is as long as the prompt."""
    return room.fill(lambda units: _build(room, str(seed), units), _LEAST_TERMS)


def _build(room: Room, seed: str, count: int) -> Example:
    rng = random.Random(seed)
    value = rng.randrange(100)
    terms, results = [str(value)], []
    for _ in range(count):
        target = rng.choice([number for number in range(100) if number != value])
        terms.append(f"{'+' if target > value else '-'} {abs(target - value)}")
        value = target
        results.append(str(value))
    answer = ", ".join(results)
    prompt = (
        "Compute the sum from left to right and list the result after each operation, separated by commas. Example: "
        f"for 1 + 3 - 2 the list is 4, 2.\n{' '.join(terms)}"
    )
    return Example(
        turns=(Message("user", prompt),),
        answer=answer,
        max_tokens=room.answer_tokens(f" {answer}", 0),
        answer_start="\nThe results are:",
    )


def score(example: Example, text: str) -> float:
    """The share of the results before the first wrong one."""
    expected, found = example.answer.split(", "), re.findall(r"\d+", text)
    right = 0
    for mine, theirs in zip(expected, found, strict=False):
        if mine != theirs:
            break
        right += 1
    return right / len(expected)


PLUGIN = Task(version=1, options=NoOptions, example=example, score=score)
