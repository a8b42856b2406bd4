"""One number in a repeated line, at a random depth."""

import random
from collections.abc import Callable
from itertools import repeat

from openmimo.core.records import Message
from openmimo.evals.task import Example, NoOptions, Room, Seed, Task
from openmimo.evals.tasks._filler import NOISE, first, insert_at
from openmimo.evals.tasks._scoring import first_number_matches


def hidden_number_task(name: str, answer_tokens: int, draw: Callable[[random.Random], str]) -> Task:
    """The task with a number that is called `name`."""

    def example(options: NoOptions, room: Room, seed: Seed) -> Example:
        rng = random.Random(str(seed))
        number, depth = draw(rng), rng.random()
        fact = f"The {name} is {number}. Keep it in mind: {number} is the {name}."

        def build(units: int) -> Example:
            text = "\n".join(insert_at(first(repeat(NOISE), units), [(depth, fact)]))
            prompt = (
                f"A {name} is hidden in a lot of irrelevant text. Find it and remember it.\n{text}\nWhat is the {name}?"
            )
            return Example(
                turns=(Message("user", prompt),),
                answer=number,
                max_tokens=room.answer_tokens(f" {number}", answer_tokens),
                answer_start=f"\nThe {name} is",
                depth=depth,
            )

        return room.fill(build)

    return Task(version=1, options=NoOptions, example=example, score=first_number_matches)
