"""Look up a key among key-value pairs: `a7,b2,c4?b` gives `2`; with two hops, `Xa,a7,Yb,b2?Y` gives `2`."""

import random
import string
from dataclasses import dataclass
from typing import Literal

from openmimo.data.task import Problem, TaskFamily


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        hops: 1: the question is a key. 2: the question is a capital letter whose value is the key.
    """

    hops: Literal[1, 2] = 1


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem with `difficulty` keys."""
    keys = rng.sample(string.ascii_lowercase, difficulty)
    values = rng.choices(string.digits, k=difficulty)
    pairs = [key + value for key, value in zip(keys, values, strict=True)]
    queried = rng.randrange(difficulty)
    question = keys[queried]
    if options.hops == 2:
        names = rng.sample(string.ascii_uppercase, difficulty)
        pairs += [name + key for name, key in zip(names, keys, strict=True)]
        question = names[queried]
    rng.shuffle(pairs)
    return Problem(
        family="lookup", difficulty=difficulty, prompt=",".join(pairs) + "?" + question, answer=values[queried]
    )


PLUGIN = TaskFamily(
    describe="find the value of a key among as many pairs as the difficulty (options: hops)",
    options=Options,
    difficulties=range(1, 27),
    make=make,
)
