"""Facts at given depths of a filler text."""

from collections.abc import Iterable
from itertools import islice
from typing import TypeVar

Unit = TypeVar("Unit")


def first(units: Iterable[Unit], count: int) -> list[Unit]:
    """The first `count` units."""
    return list(islice(units, count))


def insert_at(units: list[str], facts: list[tuple[float, str]]) -> list[str]:
    """The units with each fact at its depth (0 before the first unit, 1 after the last), in linear time."""
    result: list[str] = []
    done = 0
    for depth, fact in sorted(facts, key=lambda pair: pair[0]):
        position = round(depth * len(units))
        result += units[done:position]
        result.append(fact)
        done = position
    return result + units[done:]


NOISE = "The sea is calm. The wind is warm. The bread is fresh. We walk on. Then we turn around."
