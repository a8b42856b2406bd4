"""GSM-Infinite-like problems of arithmetic: a graph of quantities, stated sentence by sentence in random order.

Definitions: Zhou et al. 2025 (2502.05252) and, for the graphs, Ye et al. 2024 (2407.20311). Written from the
description; the wording and the words are ours.

A world has places and kinds of things. A quantity is a number of things of a kind at a place ("instance"), or a total
of a place ("total"), which is never stated. In hard problems, each instance also has an average of smaller things, and
a total is the sum of number x average. An instance equals a constant, or `constant plus|times` one quantity, or a sum
or a difference of two. The number of operations of a problem is the number of quantities that the needed quantities
depend on, each counted where it is used.

    forward: the constants are stated and a total or an instance is asked for
    reverse: a total is stated and a constant is asked for. The total is linear in it, so the answer is unique

Every value is a pair (a, b), which means a * unknown + b. In forward problems a is 0.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from openmimo.evals.tasks._words import ADJECTIVES, NOUNS

Level: TypeAlias = Literal["medium", "hard"]
Value: TypeAlias = tuple[int, int]
Operation: TypeAlias = Literal["plus", "times"]
_OPERATIONS: tuple[Operation, ...] = ("plus", "times")
_MAX_VALUE, _MAX_CONSTANT, _MAX_UNKNOWN, _MAX_OPERANDS, _MAX_DRAWS = 1000, 4, 20, 2, 2000


@dataclass(frozen=True)
class Theme:
    """The words of a world.

    Attributes:
        things: The kinds.
        thing: What a total counts, such as "adult animals".
        small: The smaller things of hard problems.
        place: The kind of place, for names.
    """

    things: tuple[str, ...]
    thing: str
    small: str
    place: tuple[str, ...]


THEMES = (
    Theme(
        ("wolves", "foxes", "otters", "badgers", "owls", "herons", "lynxes", "beavers"),
        "adult animals",
        "newborn animals",
        ("Valley", "Ridge", "Marsh", "Forest"),
    ),
    Theme(
        ("village schools", "music schools", "night schools", "art schools", "riding schools", "cooking schools"),
        "schools",
        "teachers",
        ("Town", "Harbor", "District", "Quarter"),
    ),
    Theme(
        ("silent films", "road films", "crime films", "space films", "ghost films", "dance films"),
        "films",
        "prizes",
        ("Festival", "Film Week", "Film Night", "Gala"),
    ),
)
_THEME_WEIGHTS = (8, 1, 1)


@dataclass(eq=False)
class Quantity:
    """One number of the world. Its operands are added while a problem is drawn.

    Attributes:
        name: Its name in sentences.
        operands: The quantities that it depends on.
        constant: The constant of the formula, or the whole value without operands.
        operation: How the constant and the operands are combined.
        sign: 1: the sum of two operands; -1: the difference.
        is_total: Whether it is a total, which sums its operands.
        in_pairs: Whether the total sums the products of pairs of operands, in hard problems.
    """

    name: str
    operands: list["Quantity"] = field(default_factory=list)
    constant: int = 0
    operation: Operation = "plus"
    sign: int = 1
    is_total: bool = False
    in_pairs: bool = False

    def sentence(self) -> str:
        """The statement about an instance."""
        names = [operand.name for operand in self.operands]
        if not names:
            return f"The {self.name} equals {self.constant}."
        joined = names[0]
        if len(names) == 2:
            joined = f"the {'sum of' if self.sign > 0 else 'difference between'} the {names[0]} and the {names[1]}"
        else:
            joined = f"the {joined}"
        return f"The {self.name} equals {self.constant} {self.operation} {joined}."


@dataclass(frozen=True)
class Problem:
    """A problem with its solution.

    Attributes:
        statements: The needed sentences, in an order in which they can be computed.
        question: The question, with the stated total of a reverse problem before it.
        solution: The steps and the answer.
        answer: The asked number.
        place: The place of the total. Irrelevant statements name other places.
        core: Names of needed quantities, for irrelevant statements.
        theme: The words of the world.
    """

    statements: list[str]
    question: str
    solution: str
    answer: int
    place: str
    core: list[str]
    theme: Theme


def draw_problem(rng: random.Random, level: Level, operations: int, *, reverse: bool) -> Problem:
    """A problem with exactly this number of operations (two or more; three or more in hard problems)."""
    for _ in range(_MAX_DRAWS):
        problem = _try_problem(rng, level, operations, reverse)
        if problem is not None:
            return problem
    raise AssertionError(f"no {level} problem of {operations} operations was found in {_MAX_DRAWS} draws")


def irrelevant_statements(problem: Problem, rng: random.Random) -> Iterator[str]:
    """Endless statements in the same words that depend on needed quantities, but that no needed one depends on."""
    used = set(problem.core)
    while True:
        place = _place(problem.theme, rng)
        name = f"number of {rng.choice(problem.theme.things)} in {place}"
        if name in used or place == problem.place:
            continue
        used.add(name)
        quantity = _draw_quantity(rng, name)
        chosen = rng.sample(problem.core, min(rng.choice((1, 2)), len(problem.core)))
        quantity.operands = [Quantity(one) for one in chosen]
        yield quantity.sentence()


def _place(theme: Theme, rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES).title()} {rng.choice(NOUNS).title()} {rng.choice(theme.place)}"


def _try_problem(rng: random.Random, level: Level, operations: int, reverse: bool) -> Problem | None:
    theme = rng.choices(THEMES, _THEME_WEIGHTS)[0]
    place = _place(theme, rng)
    per_thing = 2 if level == "hard" else 1
    most = min(operations // per_thing, len(theme.things), 4)
    if most == 0:
        return None
    things = rng.sample(theme.things, rng.randint(1, most))
    needed = [_draw_quantity(rng, name) for thing in things for name in _names(theme, level, thing, place)]
    total_name = f"total number of {theme.small if level == 'hard' else theme.thing} in {place}"
    total = Quantity(total_name, list(needed), is_total=True, in_pairs=level == "hard")
    if not _add_dependencies(rng, theme, needed, place, operations - len(needed)):
        return None
    leaves = [quantity for quantity in needed if not quantity.operands]
    unknown = rng.choice(leaves) if reverse else None
    if unknown is not None:
        unknown.constant = rng.randint(1, _MAX_UNKNOWN)
    values = _evaluate([*needed, total], unknown)
    if values is None:
        return None
    if unknown is None:
        return _forward(needed, total, values, place, theme)
    return _reversed(needed, total, unknown, values, place, theme)


def _names(theme: Theme, level: Level, thing: str, place: str) -> list[str]:
    number = f"number of {thing} in {place}"
    return [number, f"average number of {theme.small} per {number}"] if level == "hard" else [number]


def _add_dependencies(
    rng: random.Random, theme: Theme, needed: list[Quantity], total_place: str, operations: int
) -> bool:
    """Add `operations` operands. `needed` stays in an order of computation. Returns False if a name is drawn twice."""
    rng.shuffle(needed)
    for _ in range(operations):
        open_places = [place for place, quantity in enumerate(needed) if len(quantity.operands) < _MAX_OPERANDS]
        place = rng.choice(open_places)
        quantity = needed[place]
        earlier = [one for one in needed[:place] if one not in quantity.operands]
        if earlier and rng.random() < 0.5:
            operand = rng.choice(earlier)
        else:
            other_place = _place(theme, rng)
            operand = _draw_quantity(rng, f"number of {rng.choice(theme.things)} in {other_place}")
            if other_place == total_place or any(one.name == operand.name for one in needed):
                return False
            needed.insert(place, operand)
        quantity.operands.append(operand)
    return True


def _draw_quantity(rng: random.Random, name: str) -> Quantity:
    return Quantity(
        name,
        constant=rng.randint(1, _MAX_CONSTANT),
        operation=rng.choice(_OPERATIONS),
        sign=rng.choice((1, -1)),
    )


def _evaluate(quantities: list[Quantity], unknown: Quantity | None) -> dict[str, Value] | None:
    """The value of each quantity; None if a number is not from 1 to the maximum or is not linear in the unknown."""
    values: dict[str, Value] = {}
    for quantity in quantities:
        value = (1, 0) if quantity is unknown else _value(quantity, [values[one.name] for one in quantity.operands])
        if value is None:
            return None
        at_unknown = value[0] * (unknown.constant if unknown else 0) + value[1]
        if not 1 <= at_unknown <= _MAX_VALUE:
            return None
        values[quantity.name] = value
    return values


def _value(quantity: Quantity, operands: list[Value]) -> Value | None:
    if quantity.is_total and quantity.in_pairs:
        pairs = list(zip(operands[::2], operands[1::2], strict=True))
        if any(first[0] and second[0] for first, second in pairs):
            return None
        return _sum([_product(first, second) for first, second in pairs])
    if quantity.is_total:
        return _sum(operands)
    if not operands:
        return 0, quantity.constant
    a, b = operands[0]
    if len(operands) == 2:
        a, b = a + quantity.sign * operands[1][0], b + quantity.sign * operands[1][1]
    if quantity.operation == "times":
        return a * quantity.constant, b * quantity.constant
    return a, b + quantity.constant


def _product(first: Value, second: Value) -> Value:
    """The product, of which at most one factor depends on the unknown."""
    return first[0] * second[1] + second[0] * first[1], first[1] * second[1]


def _sum(values: list[Value]) -> Value:
    return sum(a for a, _ in values), sum(b for _, b in values)


def _forward(needed: list[Quantity], total: Quantity, values: dict[str, Value], place: str, theme: Theme) -> Problem:
    answer = values[total.name][1]
    steps = [f"The {one.name} is {_expression(one, values)}." for one in [*needed, total]]
    return Problem(
        [one.sentence() for one in needed],
        f"What is the {total.name}?",
        " ".join([*steps, f"Answer: {answer}."]),
        answer,
        place,
        [one.name for one in needed],
        theme,
    )


def _reversed(
    needed: list[Quantity], total: Quantity, unknown: Quantity, values: dict[str, Value], place: str, theme: Theme
) -> Problem | None:
    a, b = values[total.name]
    if a == 0:
        return None
    stated = a * unknown.constant + b
    steps = [f"The {one.name} is {_expression(one, values)}." for one in [*needed, total] if one is not unknown]
    equation = f"{_text((a, b))} = {stated}, so x = {unknown.constant}."
    return Problem(
        [one.sentence() for one in needed if one is not unknown],
        f"The {total.name} is {stated}. What is the {unknown.name}?",
        " ".join([f"Let x be the {unknown.name}.", *steps, equation, f"Answer: {unknown.constant}."]),
        unknown.constant,
        place,
        [one.name for one in needed],
        theme,
    )


def _expression(quantity: Quantity, values: dict[str, Value]) -> str:
    """The formula in numbers and its result, such as `2 + (3 + 4) = 9`."""
    result = _text(values[quantity.name])
    operands = [f"({text})" if " " in (text := _text(values[one.name])) else text for one in quantity.operands]
    if not operands:
        return result
    if quantity.is_total:
        formula = " + ".join(_pairs(operands) if quantity.in_pairs else operands)
    else:
        inner = operands[0]
        if len(operands) == 2:
            inner = f"({operands[0]} {'+' if quantity.sign > 0 else '-'} {operands[1]})"
        formula = f"{quantity.constant} {'+' if quantity.operation == 'plus' else '*'} {inner}"
    return result if formula == result else f"{formula} = {result}"


def _pairs(operands: list[str]) -> list[str]:
    return [f"{first} * {second}" for first, second in zip(operands[::2], operands[1::2], strict=True)]


def _text(value: Value) -> str:
    a, b = value
    if a == 0:
        return str(b)
    unknown = "x" if a == 1 else f"{a}x"
    return f"{unknown} {'+' if b > 0 else '-'} {abs(b)}" if b else unknown
