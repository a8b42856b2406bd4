"""Line retrieval (LongEval): the number in one of many named lines. The wording is ours."""

import random

from openmimo.core.records import Message
from openmimo.evals.task import Example, NoOptions, Room, Seed, Task
from openmimo.evals.tasks._filler import first
from openmimo.evals.tasks._scoring import last_number_matches
from openmimo.evals.tasks._words import distinct_keys

_ANSWER_TOKENS = 12


def example(options: NoOptions, room: Room, seed: Seed) -> Example:
    """Lines with numbers from 1 to 50000, and the question about one of them."""
    return room.fill(lambda units: _build(room, str(seed), units), least=1)


def _build(room: Room, seed: str, count: int) -> Example:
    rng = random.Random(seed)
    lines = [(key, rng.randint(1, 50_000)) for key in first(distinct_keys(rng), count)]
    asked = rng.randrange(count)
    key, value = lines[asked]
    text = "\n".join(f"line {name}: the register holds <{number}>" for name, number in lines)
    prompt = (
        f"Remember the lines of this record. Each has a name and a number.\n{text}\nThe record ends here. Which number "
        f"does the register hold in line {key}? Answer with the number."
    )
    return Example(
        turns=(Message("user", prompt),),
        answer=str(value),
        max_tokens=room.answer_tokens(f" <{value}>", _ANSWER_TOKENS),
        answer_start=f"\nIn line {key}, the register holds",
        depth=asked / max(count - 1, 1),
    )


PLUGIN = Task(version=1, options=NoOptions, example=example, score=last_number_matches)
