"""Key-value pairs and a question: `a7,b2,c4?b` gives `2`; with two hops, `Xa,a7,Yb,b2?Y` gives `2`."""

import random
import string
from dataclasses import dataclass
from typing import Literal

from openmimo.data.task import Problem, TaskFamily


@dataclass(frozen=True)
class Options:
    """hops: 1 for the value of the key, 2 for the value of the key that the capital letter stands for."""

    hops: Literal[1, 2] = 1


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Asks for the value of one of `difficulty` keys."""
    keys = rng.sample(string.ascii_lowercase, difficulty)
    values = rng.choices(string.digits, k=difficulty)
    pairs = [key + value for key, value in zip(keys, values, strict=True)]
    asked = rng.randrange(difficulty)
    question = keys[asked]
    if options.hops == 2:
        names = rng.sample(string.ascii_uppercase, difficulty)
        pairs += [name + key for name, key in zip(names, keys, strict=True)]
        question = names[asked]
    rng.shuffle(pairs)
    return Problem(
        family="lookup", difficulty=difficulty, prompt=",".join(pairs) + "?" + question, answer=values[asked]
    )


PLUGIN = TaskFamily(
    describe="find the value of a key among as many pairs as the difficulty (options: hops)",
    options=Options,
    difficulties=range(1, 27),
    make=make,
)
