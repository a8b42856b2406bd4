"""The generators of the library reasoning-gym (arXiv 2505.24760), more than a hundred, with their own scorers."""

import functools
import random
from dataclasses import dataclass
from typing import Any

from openmimo.core.errors import ConfigError, DataError
from openmimo.data.answers import final_answer
from openmimo.data.task import Problem, TaskFamily

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
        meta={"dataset": options.dataset, "index": index},
    )


def score(problem: Problem, text: str) -> float:
    """The library's own score; partial credit is possible. An answer on which its scorer fails gets 0.0."""
    dataset = _dataset(problem.meta["dataset"], problem.difficulty)
    entry = dataset[problem.meta["index"]]
    try:
        found = float(dataset.score_answer(final_answer(text), entry))
    except Exception:  # scorers of the library raise all kinds of errors on answers they do not expect
        return 0.0
    return min(max(found, 0.0), 1.0)


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
)
