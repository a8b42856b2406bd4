"""RULER frequent words: made-up words with Zipf frequencies; the second to fourth rank are asked for.

Definition: Hsieh et al. 2024 (2404.06654): the word of rank k occurs N * k^-2 / zeta(2) times. The first rank is the
noise "...". The wording is ours.
"""

import math
import random

from openmimo.core.records import Message
from openmimo.evals.task import Example, NoOptions, Room, Seed, Task
from openmimo.evals.tasks._filler import first
from openmimo.evals.tasks._scoring import share_found
from openmimo.evals.tasks._words import made_up_words

_ANSWER_TOKENS, _LEAST_WORDS = 50, 60
_ANSWER_START = "\nWithout the dots, the three most frequent coded words are:"


def example(options: NoOptions, room: Room, seed: Seed) -> Example:
    """A coded text and the question."""
    return room.fill(lambda units: _build(room, str(seed), units), _LEAST_WORDS)


def _build(room: Room, seed: str, units: int) -> Example:
    rng = random.Random(seed)
    vocabulary = first(made_up_words(rng, 3), max(room.length // 50, 8))
    entries: list[str] = []
    for rank, word in enumerate(["...", *vocabulary], start=1):
        count = round(units * 6 / math.pi**2 / rank**2)
        if count == 0:
            break
        entries += [word] * count
    rng.shuffle(entries)
    prompt = (
        "The words of this text are coded. Ignore the dots '...'. Which three coded words are the most frequent?\n"
        f"{' '.join(entries)}\n"
        "Ignore the dots '...'. Which three coded words are the most frequent in the text above?"
    )
    answer = " " + " ".join(vocabulary[:3])
    return Example(
        turns=(Message("user", prompt),),
        answer=answer,
        max_tokens=room.answer_tokens(answer, _ANSWER_TOKENS),
        answer_start=_ANSWER_START,
        details={"references": vocabulary[:3]},
    )


PLUGIN = Task(version=1, options=NoOptions, example=example, score=share_found)
