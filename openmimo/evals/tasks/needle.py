"""Retrieval of one fact among several, on token ids, with the examples of `openmimo.data.tasks._needles`."""

from dataclasses import dataclass

import numpy as np

from openmimo.data.tasks._needles import make_needle, needle_symbols
from openmimo.data.tokenizer import Tokenizer
from openmimo.evals.task import Example, Task


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


def example(options: Options, tokenizer: Tokenizer, length: int, rng: np.random.Generator) -> Example:
    """Facts in filler, then one query. The depth of the queried fact is uniform."""
    symbols = needle_symbols(tokenizer, num_keys=options.num_keys, num_values=options.num_values)
    depth = float(rng.random())
    ids, answers = make_needle(symbols, length=length, num_pairs=options.num_pairs, num_queries=1, rng=rng, depth=depth)
    position = int(answers[0])
    return Example(ids[:position].tolist(), [int(ids[position])], depth)


def score(example: Example, output_ids: list[int]) -> float:
    """1 if the output begins with the answer, else 0."""
    return float(output_ids[: len(example.answer_ids)] == example.answer_ids)


PLUGIN = Task(version=1, options=Options, example=example, score=score)
