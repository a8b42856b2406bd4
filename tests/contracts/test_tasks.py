"""Contract of every evaluation task.

The same seed gives the same examples. The answer key scores 1 and nonsense scores 0. Lengths are exact.
"""

import numpy as np
import pytest

from openmimo.data.tokenizer import Tokenizer
from openmimo.evals.task import TASKS, wilson_interval


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["some words to learn a few merges from, and a few more words"] * 50, 300)


@pytest.mark.parametrize("name", TASKS.names())
def test_task(name, tokenizer):
    task = TASKS.get(name)
    options = task.options()

    def make(seed, length):
        return task.example(options, tokenizer, length, np.random.default_rng(seed))

    for length in (64, 200):
        for seed in range(20):
            example = make(seed, length)
            assert example == make(seed, length)
            assert len(example.prompt_ids) + len(example.answer_ids) == length
            assert 0.0 <= example.depth <= 1.0
            assert task.score(example, example.answer_ids) == 1.0
            assert task.score(example, [tokenizer.pad_id] * 4) == 0.0
    assert make(1, 64) != make(2, 64)


def test_wilson_interval_contains_the_mean_and_narrows():
    low, high = wilson_interval(0.9, 64)
    assert low < 0.9 < high
    narrower = wilson_interval(0.9, 640)
    assert narrower[1] - narrower[0] < high - low
    assert wilson_interval(1.0, 64)[1] == 1.0
    for examples in range(1, 200):
        for found in range(examples + 1):
            low, high = wilson_interval(found / examples, examples)
            assert 0.0 <= low <= found / examples <= high <= 1.0
