"""InfiniteBench Math.Find: an extreme or the median of integers from 0 to 99 (2402.13718). The wording is ours."""

import random
from collections.abc import Callable

from openmimo.core.records import Message
from openmimo.evals.task import Example, NoOptions, Room, Seed, Task
from openmimo.evals.tasks._scoring import first_number_matches

_LEAST_NUMBERS = 7
_CHOICES: dict[str, Callable[[list[int]], int]] = {
    "largest number": lambda ordered: ordered[-1],
    "second largest number": lambda ordered: ordered[-2],
    "third largest number": lambda ordered: ordered[-3],
    "smallest number": lambda ordered: ordered[0],
    "second smallest number": lambda ordered: ordered[1],
    "third smallest number": lambda ordered: ordered[2],
    "median": lambda ordered: ordered[len(ordered) // 2],
}


def example(options: NoOptions, room: Room, seed: Seed) -> Example:
    """An odd number of integers, of which equal ones count separately, and the question."""
    return room.fill(lambda units: _build(room, str(seed), 2 * units + 1), least=_LEAST_NUMBERS // 2)


def _build(room: Room, seed: str, count: int) -> Example:
    rng = random.Random(seed)
    which = rng.choice(list(_CHOICES))
    numbers = [rng.randrange(100) for _ in range(count)]
    answer = str(_CHOICES[which](sorted(numbers)))
    prompt = (
        f"Find the {which} of this list, in which equal numbers count separately.\n{numbers}\nFind the {which} of the "
        "list above."
    )
    return Example(
        turns=(Message("user", prompt),),
        answer=answer,
        max_tokens=room.answer_tokens(f" {answer}", 3),
        answer_start=f"\nThe {which} is:",
    )


PLUGIN = Task(version=1, options=NoOptions, example=example, score=first_number_matches)
