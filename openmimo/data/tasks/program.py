"""Find a program from examples: an answer to `prog 312>324 45>65` is `rev;inc1`, in the language of `_mini_language`.

The answer runs on hidden tests, which are grouped by the pass rate of a set of flawed programs. These are the reference
with an operation removed, replaced or moved, and random programs.
"""

import random
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from openmimo.core.fields import Bounds
from openmimo.data.task import Problem, TaskFamily, final_answer
from openmimo.data.tasks._graded_tests import difficulty_groups, soft_reward, strict_reward
from openmimo.data.tasks._mini_language import Program, ProgramError, parse, passes, random_operation, run, to_text

Tests = tuple[tuple[str, str], ...]

_MAX_TRIES = 100


@dataclass(frozen=True)
class Options:
    """Options of the task.

    Attributes:
        num_examples: Number of examples in the prompt.
        max_digits: Maximum number of digits of an example's input; the minimum is 2.
        num_tests: Number of hidden tests. Their inputs have 1 to 8 digits.
        num_groups: Maximum number of difficulty groups of the tests.
        reward: "strict" or "soft" as in `openmimo.data.tasks._graded_tests`, or "all" for 1.0 only if every test
            passes.
    """

    num_examples: Annotated[int, Bounds(least=1, most=100)] = 2
    max_digits: Annotated[int, Bounds(least=2, most=100)] = 4
    num_tests: Annotated[int, Bounds(least=1, most=1000)] = 16
    num_groups: Annotated[int, Bounds(least=1, most=100)] = 4
    reward: Literal["strict", "soft", "all"] = "strict"


def make(rng: random.Random, difficulty: int, options: Options) -> Problem:
    """Make a problem whose program has `difficulty` operations.

    Programs are drawn until the tests distinguish the program from each program with one operation less.
    """
    lengths = [1 + number * 8 // options.num_tests for number in range(options.num_tests)]
    for _ in range(_MAX_TRIES):
        program = _random_program(rng, difficulty)
        tests = tuple((digits, run(program, digits)) for digits in (_random_digits(rng, length) for length in lengths))
        if not any(all(_passed(shorter, tests)) for shorter in [(), *_without_one(program)]):
            break
    examples = [_example(rng, program, options.max_digits) for _ in range(options.num_examples)]
    table = [_passed(flawed, tests) for flawed in _flawed_programs(program, rng)]
    return Problem(
        family="program",
        difficulty=difficulty,
        prompt="prog " + " ".join(f"{digits}>{result}" for digits, result in examples),
        answer=to_text(program),
        meta={
            "tests": tests,
            "groups": difficulty_groups(np.array(table), options.num_groups),
            "reward": options.reward,
        },
    )


def _random_program(rng: random.Random, length: int) -> Program:
    """Draw a program with at most one `dup`, so that results stay short and within the step budget."""
    while True:
        program = tuple(random_operation(rng) for _ in range(length))
        if program.count(("dup", None)) <= 1:
            return program


def _random_digits(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("0123456789", k=length))


def _example(rng: random.Random, program: Program, max_digits: int) -> tuple[str, str]:
    """Draw an input and its output, if possible with an output that is neither the input nor empty."""
    for _ in range(_MAX_TRIES):
        digits = _random_digits(rng, rng.randint(2, max_digits))
        result = run(program, digits)
        if result not in ("", digits):
            break
    return digits, result


def _without_one(program: Program) -> list[Program]:
    return [program[:index] + program[index + 1 :] for index in range(len(program))]


def _flawed_programs(program: Program, rng: random.Random) -> list[Program]:
    """Return the program with one operation removed or replaced, or with two neighbors swapped, and random programs."""
    indices = range(len(program))
    replaced = [program[:i] + (random_operation(rng),) + program[i + 1 :] for i in indices for _ in range(4)]
    swapped = [program[:i] + (program[i + 1], program[i]) + program[i + 2 :] for i in indices[:-1]]
    return [*_without_one(program), *replaced, *swapped, *((random_operation(rng),) for _ in range(4))]


def _passed(program: Program, tests: Tests) -> tuple[bool, ...]:
    return tuple(passes(program, digits, expected) for digits, expected in tests)


def passed_tests(problem: Problem, text: str) -> tuple[bool, ...]:
    """Return, for each hidden test, whether the program in `text` passes it; all False if it is not a program."""
    tests: Tests = problem.meta["tests"]
    try:
        return _passed(parse(final_answer(text)), tests)
    except ProgramError:
        return (False,) * len(tests)


def score(problem: Problem, text: str) -> float:
    """Return the reward of the hidden tests, from 0.0 to 1.0."""
    passed = passed_tests(problem, text)
    if all(passed):
        return 1.0
    if problem.meta["reward"] == "all":
        return 0.0
    reward = strict_reward if problem.meta["reward"] == "strict" else soft_reward
    return reward(passed, problem.meta["groups"])


PLUGIN = TaskFamily(
    describe="find a program of as many operations as the difficulty (options: num_examples, num_tests, reward, ...)",
    options=Options,
    difficulties=range(1, 9),
    make=make,
    score=score,
)
