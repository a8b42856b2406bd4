"""Demonstrations of verifiable tasks as training rows: question and reference answer in the chat format.

Problems are held out by a hash of their prompt, as in `openmimo.data.task`. The training rows therefore contain none of
the validation problems of the environments and of this source.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from openmimo.core.config import to_dict
from openmimo.core.errors import ConfigError, DataError
from openmimo.core.fields import Fraction
from openmimo.core.records import Message
from openmimo.data.chat.conversation import encode_conversation
from openmimo.data.chat.rows import Document, join_row, make_document
from openmimo.data.config import TaskConfig, without_paths
from openmimo.data.source import Row, RowMakers, Split, SyntheticSource
from openmimo.data.synthetic import makers_by_split
from openmimo.data.task import Problem, Task, open_task, prompt_messages
from openmimo.data.tokenizer import Tokenizer

DEFAULT_TASKS = (TaskConfig("addition", 1, 2), TaskConfig("sorting", 2, 8), TaskConfig("reverse", 2, 7))
_STREAM = 2**62  # number of problems in the stream


@dataclass(frozen=True)
class Options:
    """Options of source `tasks`.

    Attributes:
        tasks: The demonstrated tasks with their weights.
        noise: Share of demonstrations with a wrong answer (that of another problem).
        system: The system message. Rollouts must use the same one.
    """

    tasks: tuple[TaskConfig, ...] = DEFAULT_TASKS
    noise: Fraction = 0.0
    system: str = ""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("Source 'tasks' needs at least one task.")


def row_makers(options: Options, tokenizer: Tokenizer, sequence_length: int, validation_fraction: float) -> RowMakers:
    """Return makers of rows of demonstrations, with loss on assistant tokens. Raises DataError if they do not fit."""
    tasks = [open_task(config, held_out_fraction=validation_fraction) for config in options.tasks]
    weights = [config.weight for config in options.tasks]

    def encode(problem: Problem, answer: str) -> Document:
        if not answer:
            raise DataError(f"Problem {problem.id!r} of a task has no answer to demonstrate. Give each one an answer.")
        messages = [*prompt_messages(problem, options.system), Message("assistant", answer)]
        return make_document(encode_conversation(tokenizer, messages), tokenizer.end_of_text_id)

    def demonstration(rng: random.Random, split: Split) -> Document:
        task = rng.choices(tasks, weights)[0]
        problem = task.problem_at(rng.randrange(_STREAM), split=split, seed=0)
        return encode(problem, _wrong_answer(task, problem, rng) if rng.random() < options.noise else problem.answer)

    def make_row(rng: np.random.Generator, split: Split) -> Row:
        draws = random.Random(int(rng.integers(2**63)))
        documents, room = [], sequence_length
        while len((document := demonstration(draws, split)).token_ids) <= room:
            documents.append(document)
            room -= len(document.token_ids)
        return join_row(documents, sequence_length, filler=lambda: document)

    for task in tasks:
        task.problem_at(0, split="train", seed=0)
        _check_length(task, encode, sequence_length)
    makers = makers_by_split(make_row, validation_fraction, "tasks")
    return RowMakers(makers.by_split, _content(options, tasks))


def _content(options: Options, tasks: Sequence[Task]) -> str:
    """Return the options without the paths of problem files, and the hashes of those files."""
    files = [[file.sha256 for file in task.files] for task in tasks]
    return (
        json.dumps({"options": without_paths(to_dict(options)), "files": files}, sort_keys=True) if any(files) else ""
    )


def _wrong_answer(task: Task, problem: Problem, rng: random.Random) -> str:
    """Return the answer of another problem of the same difficulty; the right answer if all draws agree with it."""
    for _ in range(100):
        other = task.family.make(rng, problem.difficulty, task.options).answer
        if task.score(problem, other) < 1.0:
            return other
    return problem.answer


def _check_length(task: Task, encode: Callable[[Problem, str], Document], sequence_length: int) -> None:
    """Check the length of some of the hardest problems, which tend to be the longest."""
    for number in range(20):
        problem = task.family.make(random.Random(number), task.config.max_difficulty, task.options)
        length = len(encode(problem, problem.answer).token_ids)
        if length > sequence_length:
            raise DataError(
                f"Source 'tasks' cannot fit a demonstration of {task.config.name!r} at difficulty {problem.difficulty} "
                f"({length} tokens) into rows of {sequence_length}. Lengthen the rows or lower max_difficulty."
            )


PLUGIN = SyntheticSource(
    describe="demonstrations of verifiable tasks in the chat format (options: tasks, noise, system)",
    options=Options,
    row_makers=row_makers,
)
