"""Contract of every audio task.

The same seed gives the same example. The reference scores 1 for every judge that needs no recordings, the references of
other examples score no more than chance, and no answer raises.
"""

import numpy as np
import pytest

from openmimo.evals.audio.runner import answer_task, summarize
from openmimo.evals.audio.task import AUDIO_TASKS, SCORE, Answer, Sound

pytest.importorskip("soxr", reason="needs the extra audio")
OPTIONS = {
    **{name: (name, {}) for name in AUDIO_TASKS.names()},
    "synthesis": ("synthesis", {"candidates": 4}),
    **{f"speech_mmlu_{form}": ("speech_mmlu", {"form": form}) for form in ("s2s", "t2s", "t2t")},
}
EXAMPLES = 8


def opened(key, seed=0):
    name, options = OPTIONS[key]
    task = AUDIO_TASKS.get(name)
    return task.open(task.options(**options), seed)


class Oracle:
    def answer(self, example, seed):
        return example.reference


@pytest.fixture(scope="module")
def tasks():
    return {key: opened(key) for key in OPTIONS}


def same(one, other):
    sounds = [
        [part.waveform if isinstance(part, Sound) else part for part in (*example.parts, example.reference.heard)]
        for example in (one, other)
    ]
    return len(sounds[0]) == len(sounds[1]) and all(map(np.array_equal, *sounds))


@pytest.mark.parametrize("key", OPTIONS)
def test_examples_depend_on_the_seed_and_the_index_only(tasks, key):
    task = tasks[key]
    assert same(task.example(3), opened(key).example(3))
    assert not same(task.example(3), task.example(4))
    assert not all(same(task.example(index), opened(key, seed=1).example(index)) for index in range(3))
    assert all(part.waveform.dtype == np.float32 for part in task.example(3).parts if isinstance(part, Sound))


@pytest.mark.parametrize("key", OPTIONS)
def test_references_score_1_and_those_of_others_score_chance(tasks, key):
    task = tasks[key]
    answered = list(answer_task(key, task, Oracle(), range(EXAMPLES)))
    score = next(one for one in summarize(key, task, answered) if one.measure == SCORE)
    assert (score.value, score.reference) == (1.0, 1.0)
    assert score.low < 1.0 < score.high + 1e-9
    shuffled = np.mean([one.shuffled[SCORE][0] for one in answered])
    assert 0.0 <= score.chance < 0.55
    # three standard deviations of a share
    assert shuffled <= score.chance + 3 * np.sqrt(score.chance * (1 - score.chance) / EXAMPLES) + 1e-9


@pytest.mark.parametrize("key", OPTIONS)
def test_no_answer_raises_and_nothing_scores_0(tasks, key):
    task = tasks[key]
    example = task.example(0)
    nothing = [Answer(), Answer("\x00"), Answer("", Sound(np.zeros(0, np.float32)))]
    for answer in nothing:
        assert task.measures(example, answer)[SCORE] == (0.0, 1.0)
    for answer in (Answer("x" * 999), Answer("", Sound(np.zeros(500, np.float32)))):
        value, count = task.measures(example, answer)[SCORE]
        assert 0.0 <= value <= count == 1.0
