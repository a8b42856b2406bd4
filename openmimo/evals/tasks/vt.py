"""RULER variable tracking: a value passes through a chain of variables in noise; all of them are asked for.

Definition: Hsieh et al. 2024 (2404.06654). The prompt begins with one solved example, as there. The wording is ours.
"""

import random
import string
from dataclasses import dataclass
from itertools import repeat

from openmimo.core.fields import PositiveInt, check_fields
from openmimo.core.records import Message
from openmimo.evals.task import Example, Room, Seed, Task
from openmimo.evals.tasks._filler import NOISE, first, insert_at
from openmimo.evals.tasks._scoring import share_found
from openmimo.evals.tasks._words import digits

_ANSWER_TOKENS = 30


@dataclass(frozen=True)
class Options:
    """Options of task `vt`.

    Attributes:
        hops: Assignments after the first.
    """

    hops: PositiveInt = 4

    def __post_init__(self) -> None:
        check_fields(self, "options of task 'vt'")


@dataclass(frozen=True)
class _Chain:
    variables: list[str]
    value: str

    @classmethod
    def draw(cls, rng: random.Random, hops: int, letters: int) -> "_Chain":
        variables: list[str] = []
        while len(variables) <= hops:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in variables:
                variables.append(name)
        return cls(variables, digits(rng, 5))

    @property
    def lines(self) -> list[str]:
        sources = [self.value, *(f"VAR {name}" for name in self.variables)]
        return [f"VAR {name} = {source}" for name, source in zip(self.variables, sources, strict=False)]

    @property
    def question(self) -> str:
        return f"Which variables have the value {self.value} in the text above?"

    @property
    def answer_start(self) -> str:
        return f"\nBy the assignments, the {len(self.variables)} variables with the value {self.value} are:"


def example(options: Options, room: Room, seed: Seed) -> Example:
    """A solved example with shorter names, then the chain in noise and the question."""
    return room.fill(lambda units: _build(options, room, str(seed), units))


def _build(options: Options, room: Room, seed: str, units: int) -> Example:
    rng = random.Random(seed)
    solved, chain = _Chain.draw(rng, options.hops, 3), _Chain.draw(rng, options.hops, 5)
    depths = sorted(rng.random() for _ in chain.lines)
    text = "\n".join(insert_at(first(repeat(NOISE), units), list(zip(depths, chain.lines, strict=True))))
    shown = "\n".join(insert_at([NOISE] * 4, [(rank / options.hops, line) for rank, line in enumerate(solved.lines)]))
    prompt = (
        "Follow the assignments of variables in the text. A variable takes the value of the variable that is assigned "
        f"to it.\n{shown}\n{solved.question}{solved.answer_start} {' '.join(solved.variables)}\n\n{text}\n"
        f"{chain.question}"
    )
    answer = " " + " ".join(chain.variables)
    return Example(
        turns=(Message("user", prompt),),
        answer=answer,
        max_tokens=room.answer_tokens(answer, _ANSWER_TOKENS),
        answer_start=chain.answer_start,
        depth=depths[0],
        details={"references": chain.variables},
    )


PLUGIN = Task(version=1, options=Options, example=example, score=share_found)
