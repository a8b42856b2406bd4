"""GSM-Infinite, symbolic set: a tree of assignments among others without a value; which variables have a value?

Definition: Zhou et al. 2025 (2502.05252): a root from 0 to 10, each child equals its parent, its parent + 1 or - 1. The
noise is a second tree without a root value. The score is 1 if the set of variables is right. The wording is ours.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from openmimo.core.fields import Bounds, check_fields
from openmimo.core.records import Message
from openmimo.evals.task import Example, Room, Seed, Task
from openmimo.evals.tasks._filler import first

_MAX_VARIABLE = 10**6


@dataclass(frozen=True)
class Options:
    """Options of task `gsm_symbolic`.

    Attributes:
        operations: Variables of the tree.
    """

    operations: Annotated[int, Bounds(least=2, most=100)] = 4

    def __post_init__(self) -> None:
        check_fields(self, "options of task 'gsm_symbolic'")


def example(options: Options, room: Room, seed: Seed) -> Example:
    """Assignments in random order, and the question."""
    return room.fill(lambda units: _build(options, room, str(seed), units))


def _build(options: Options, room: Room, seed: str, units: int) -> Example:
    rng = random.Random(seed)
    names = _names(rng)
    tree = first(names, options.operations)
    values = {tree[0]: rng.randint(0, 10)}
    statements = [f"assign {tree[0]} = {values[tree[0]]}."]
    for place, name in enumerate(tree[1:], start=1):
        parent, step = rng.choice(tree[:place]), rng.choice((0, 1, -1))
        values[name] = values[parent] + step
        statements.append(_statement(name, parent, step))
    asked = values[rng.choice(tree)]
    noise = [next(names)]
    for name in first(names, units):
        statements.append(_statement(name, rng.choice(noise), rng.choice((0, 1, -1))))
        noise.append(name)
    rng.shuffle(statements)
    matching = [name for name in tree if values[name] == asked]
    prompt = (
        "The statements assign values to variables, in no particular order.\n"
        f"{' '.join(statements)}\nWhich variables certainly have the value {asked}? List them and nothing else."
    )
    answer = " " + ", ".join(matching)
    return Example(
        turns=(Message("user", prompt),),
        answer=answer,
        max_tokens=room.answer_tokens(", ".join(tree), 0),
        answer_start=f"\nThe variables with the value {asked} are:",
        details={"variables": matching},
    )


def _statement(name: str, parent: str, step: int) -> str:
    return f"assign {name} = {parent}{('', ' + 1', ' - 1')[step]}."


def _names(rng: random.Random) -> Iterator[str]:
    """Distinct names V000000 to V999999."""
    used: set[str] = set()
    while True:
        name = f"V{rng.randrange(_MAX_VARIABLE):06d}"
        if name not in used:
            used.add(name)
            yield name


def score(example: Example, text: str) -> float:
    """1 if the variables in the text are exactly the right ones."""
    return float(set(re.findall(r"V\d{6}", text)) == set(example.details["variables"]))


PLUGIN = Task(version=1, options=Options, example=example, score=score)
