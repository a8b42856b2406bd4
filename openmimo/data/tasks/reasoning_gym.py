"""The generators of the library reasoning-gym (arXiv 2505.24760), more than a hundred, with their own scorers."""

import base64
import functools
import pickle
import random
from dataclasses import dataclass
from typing import Any

from openmimo.core.errors import ConfigError, DataError
from openmimo.data.task import Problem, TaskFamily, final_answer
from openmimo.runtime.isolated.calls import Call, isolated_calls

SCORE_SECONDS = 5.0
MAX_CHARACTERS = 10_000
_STREAM = 2**31


@dataclass(frozen=True)
class Options:
    """dataset: a name of reasoning-gym, such as `chain_sum`. The difficulty is the level of its curriculum, from 1."""

    dataset: str


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """A problem of the data set. Raises ConfigError if the library or the data set is missing."""
    index = rng.randrange(_STREAM)
    entry = _dataset(options.dataset, difficulty)[index]
    if not isinstance(entry.get("answer"), str):
        raise DataError(f"reasoning-gym's {options.dataset!r} has no reference answers, so it cannot be used here.")
    return Problem(
        family="reasoning_gym",
        difficulty=difficulty,
        prompt=entry["question"],
        answer=entry["answer"],
        meta={"dataset": options.dataset, "entry": base64.b64encode(pickle.dumps(entry)).decode()},
    )


def score(problem: Problem, text: str) -> float:
    """The library's own score; partial credit is possible. An answer on which its scorer fails or hangs gets 0.0."""
    entry = (problem.meta["dataset"], problem.difficulty, problem.meta["entry"])
    call = Call(f"{__name__}:library_score", (*entry, final_answer(text)[-MAX_CHARACTERS:]))
    prepare = Call(f"{__name__}:library_score", (*entry, problem.answer))
    found = isolated_calls().run(call, seconds=SCORE_SECONDS, prepare=prepare).value or 0.0
    return min(max(found, 0.0), 1.0)


def library_score(dataset: str, difficulty: int, entry: str, answer: str) -> float:
    """What the library's scorer returns. Some of its scorers pass the answer to `eval`: isolate this call.

    entry: the library's own record of the problem, pickled, in base64. Another process would not make the same one from
    the index: some generators depend on the order of sets.
    """
    return float(_dataset(dataset, difficulty).score_answer(answer, pickle.loads(base64.b64decode(entry))))


@functools.lru_cache(maxsize=32)
def _dataset(name: str, difficulty: int) -> Any:
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise ConfigError("Task 'reasoning_gym' needs the package reasoning-gym: pip install reasoning-gym") from error
    if name not in factory.DATASETS:
        raise ConfigError(f"reasoning-gym has no data set {name!r}; it has {', '.join(sorted(factory.DATASETS))}.")
    if difficulty > 1 and not factory.has_curriculum(name):
        raise ConfigError(f"reasoning-gym's {name!r} has no curriculum, so difficulty 1 is the only one.")
    if not factory.has_curriculum(name):
        return factory.create_dataset(name, seed=0, size=_STREAM)
    curriculum = factory.create_curriculum(name)
    curriculum.set_global_level(difficulty - 1)
    dataset_type = factory.DATASETS[name][0]
    return dataset_type(config=curriculum.generate_configuration({"seed": 0, "size": _STREAM}))


PLUGIN = TaskFamily(
    describe="a generator of the library reasoning-gym (options: dataset)",
    options=Options,
    difficulties=range(1, 11),
    make=make,
    score=score,
    is_instant=lambda options: False,
)
