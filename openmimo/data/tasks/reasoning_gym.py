"""The generators and scorers of the library reasoning-gym (arXiv 2505.24760): more than a hundred data sets."""

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
    """Options of the task. The difficulty is the level of the data set's curriculum, starting at 1.

    Attributes:
        dataset: Name of a data set of reasoning-gym, such as `chain_sum`.
    """

    dataset: str


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem of the data set.

    Raises:
        ConfigError: The library or the data set does not exist.
        DataError: The data set has no reference answers.
    """
    index = rng.randrange(_STREAM)
    entry = _dataset(options.dataset, difficulty)[index]
    if not isinstance(entry.get("answer"), str):
        raise DataError(f"reasoning-gym's {options.dataset!r} has no reference answers, which this task needs.")
    return Problem(
        family="reasoning_gym",
        difficulty=difficulty,
        prompt=entry["question"],
        answer=entry["answer"],
        meta={"dataset": options.dataset, "entry": base64.b64encode(pickle.dumps(entry)).decode()},
    )


def score(problem: Problem, text: str) -> float:
    """Return the library's score, from 0.0 to 1.0 with partial credit; 0.0 if its scorer fails or hangs."""
    entry = (problem.meta["dataset"], problem.difficulty, problem.meta["entry"])
    call = Call(f"{__name__}:library_score", (*entry, final_answer(text)[-MAX_CHARACTERS:]))
    prepare = Call(f"{__name__}:library_score", (*entry, problem.answer))
    value = isolated_calls().run(call, seconds=SCORE_SECONDS, prepare=prepare).value or 0.0
    return min(max(value, 0.0), 1.0)


def library_score(dataset: str, difficulty: int, entry: str, answer: str) -> float:
    """Return the result of the library's scorer.

    Some of its scorers pass the answer to `eval`: run this function in an isolated process.

    Args:
        dataset: Name of the data set.
        difficulty: Level of its curriculum.
        entry: The library's record of the problem, pickled, in base64. Another process might not generate the same
            record from its index, because some generators depend on the iteration order of sets.
        answer: The answer to score.
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
        raise ConfigError(f"reasoning-gym's {name!r} has no curriculum, so its only difficulty is 1.")
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
