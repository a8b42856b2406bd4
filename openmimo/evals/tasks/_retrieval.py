"""RULER's retrieval of needles: facts `key -> value` in noise, in text or among other facts of the same form.

Definition: Hsieh et al. 2024 (2404.06654), section 3 and appendix. The wording is ours.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from openmimo.core.records import Message
from openmimo.evals.task import Example, NoOptions, Room, Seed, Task
from openmimo.evals.tasks._filler import NOISE, first, insert_at
from openmimo.evals.tasks._scoring import share_found
from openmimo.evals.tasks._words import digits, distinct_keys, identifier, join_names, sentences

Haystack: TypeAlias = Literal["noise", "text", "needles"]
_ANSWER_TOKENS = 128
_DEPTHS = 40


@dataclass(frozen=True)
class Retrieval:
    """One configuration of the task.

    Attributes:
        haystack: The filler: one repeated line, sentences, or facts of the same form.
        keys: Facts with different keys, in addition to the filler.
        values: Values of each key.
        queries: Keys that are asked for.
        uuid_keys: Whether keys are UUIDs in place of words.
        uuid_values: Whether values are UUIDs in place of numbers.
    """

    haystack: Haystack
    keys: int = 1
    values: int = 1
    queries: int = 1
    uuid_keys: bool = False
    uuid_values: bool = False

    @property
    def kind(self) -> str:
        """What the values are called."""
        return "code" if self.uuid_values else "number"


def retrieval_task(settings: Retrieval) -> Task:
    """The task of one configuration."""

    def example(options: NoOptions, room: Room, seed: Seed) -> Example:
        return room.fill(lambda units: _build(settings, room, str(seed), units))

    return Task(version=1, options=NoOptions, example=example, score=share_found)


def _build(settings: Retrieval, room: Room, seed: str, units: int) -> Example:
    rng = random.Random(seed)
    keys = _keys(settings, rng)
    facts = {key: [_value(settings, rng) for _ in range(settings.values)] for key in first(keys, settings.keys)}
    queried = rng.sample(list(facts), settings.queries)
    asked = [value for key in queried for value in facts[key]]
    lines = [_fact(settings, key, value) for key, values in facts.items() for value in values]
    depths = sorted(step / (_DEPTHS - 1) for step in rng.sample(range(_DEPTHS), len(lines)))
    rng.shuffle(depths)
    first_depth = depths[list(facts).index(queried[0]) * settings.values]
    filler = first(_FILLERS[settings.haystack](settings, keys, rng), units)
    separator = " " if settings.haystack == "text" else "\n"
    text = separator.join(insert_at(filler, list(zip(depths, lines, strict=True))))
    answer = join_names(asked)
    return Example(
        turns=(Message("user", _prompt(settings, queried, text)),),
        answer=f" {answer}.",
        max_tokens=room.answer_tokens(answer, _ANSWER_TOKENS),
        answer_start=_answer_start(settings, queried),
        depth=first_depth,
        details={"references": asked, "queried": queried},
    )


def _prompt(settings: Retrieval, queried: list[str], text: str) -> str:
    kind, many = settings.kind, settings.values * settings.queries > 1
    what = f"Several secret {kind}s are" if many else f"A secret {kind} is"
    which = f"What are all the secret {kind}s" if many else f"What is the secret {kind}"
    return (
        f"{what} hidden in the text below. Remember the {kind}{'s' if many else ''}; there is a question at the end.\n"
        f"{text}\n"
        f"{which} of {join_names(queried)} in the text above?"
    )


def _answer_start(settings: Retrieval, queried: list[str]) -> str:
    many = settings.values * settings.queries > 1
    kind = f"{settings.kind}s" if many else settings.kind
    return f"\nThe secret {kind} of {join_names(queried)} in the text {'are' if many else 'is'}"


def _fact(settings: Retrieval, key: str, value: str) -> str:
    return f"A secret {settings.kind} of {key} is: {value}."


def _keys(settings: Retrieval, rng: random.Random) -> Iterator[str]:
    if settings.uuid_keys:
        return (identifier(rng) for _ in itertools.count())
    return distinct_keys(rng)


def _value(settings: Retrieval, rng: random.Random) -> str:
    return identifier(rng) if settings.uuid_values else digits(rng, 7)


def _other_facts(settings: Retrieval, keys: Iterator[str], rng: random.Random) -> Iterator[str]:
    return (_fact(settings, key, _value(settings, rng)) for key in keys)


_FILLERS: dict[Haystack, Callable[[Retrieval, Iterator[str], random.Random], Iterator[str]]] = {
    "noise": lambda settings, keys, rng: itertools.repeat(NOISE),
    "text": lambda settings, keys, rng: sentences(rng),
    "needles": _other_facts,
}
