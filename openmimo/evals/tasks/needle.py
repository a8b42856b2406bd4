"""Retrieval of one fact among several, in token ids; the examples are those of `openmimo.data.tasks._needles`."""

from dataclasses import dataclass

import numpy as np

from openmimo.data.tasks._needles import make_needle, needle_symbols
from openmimo.data.tokenizer import Tokenizer
from openmimo.evals.task import Example, Task


@dataclass(frozen=True)
class Options:
    """num_pairs: facts in the context, of which one is asked. num_keys, num_values: the alphabets, as in training."""

    num_pairs: int = 4
    num_keys: int = 26
    num_values: int = 36


def example(options: Options, tokenizer: Tokenizer, length: int, rng: np.random.Generator) -> Example:
    """Facts in filler, then one question; the fact asked lies at a depth drawn uniformly."""
    symbols = needle_symbols(tokenizer, num_keys=options.num_keys, num_values=options.num_values)
    depth = float(rng.random())
    ids, answers = make_needle(symbols, length=length, num_pairs=options.num_pairs, num_queries=1, rng=rng, depth=depth)
    place = int(answers[0])
    return Example(ids[:place].tolist(), [int(ids[place])], depth)


def score(example: Example, output_ids: list[int]) -> float:
    """1 if the answer follows, else 0."""
    return float(output_ids[: len(example.answer_ids)] == example.answer_ids)


PLUGIN = Task(version=1, options=Options, example=example, score=score)
