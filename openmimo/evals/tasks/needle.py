"""Retrieval of one fact among several, on token ids, with the examples of `openmimo.data.tasks._needles`."""

from dataclasses import dataclass

import numpy as np

from openmimo.data.tasks._needles import make_needle, needle_symbols
from openmimo.evals.task import Example, Room, Seed, Task
from openmimo.evals.tasks._tokens import exact, token_example


@dataclass(frozen=True)
class Options:
    """Options of task `needle`.

    Attributes:
        num_pairs: Facts in the context, one of which is queried.
        num_keys: Size of the alphabet of keys, as in training.
        num_values: Size of the alphabet of values, as in training.
    """

    num_pairs: int = 4
    num_keys: int = 26
    num_values: int = 36


def example(options: Options, room: Room, seed: Seed) -> Example:
    """Facts in filler, then one query. The depth of the queried fact is uniform."""
    rng = np.random.default_rng(seed)
    symbols = needle_symbols(room.tokenizer, num_keys=options.num_keys, num_values=options.num_values)
    depth = float(rng.random())
    ids, answers = make_needle(
        symbols, length=room.length, num_pairs=options.num_pairs, num_queries=1, rng=rng, depth=depth
    )
    position = int(answers[0])
    return token_example(room, ids[:position], [int(ids[position])], depth)


PLUGIN = Task(version=1, options=Options, example=example, score=exact)
