"""NoLiMa-type latent retrieval: fact and question share no word, and common knowledge connects them (2502.05167).

The facts are ours: landmarks with their city (one hop) and country (two hops).
"""

import random
import re
from dataclasses import dataclass
from typing import Literal

from openmimo.core.fields import check_fields
from openmimo.core.records import Message
from openmimo.evals.task import Example, Room, Seed, Task
from openmimo.evals.tasks._filler import first, insert_at
from openmimo.evals.tasks._words import NAMES, sentences

_ANSWER_TOKENS = 32
_LANDMARKS = (
    ("the Eiffel Tower", "Paris", "France"),
    ("the Colosseum", "Rome", "Italy"),
    ("the Brandenburg Gate", "Berlin", "Germany"),
    ("Big Ben", "London", "England"),
    ("the Sagrada Familia", "Barcelona", "Spain"),
    ("the Acropolis", "Athens", "Greece"),
    ("the Statue of Liberty", "New York", "the United States"),
    ("the Taj Mahal", "Agra", "India"),
    ("the Hagia Sophia", "Istanbul", "Turkey"),
    ("the Forbidden City", "Beijing", "China"),
    ("the Little Mermaid statue", "Copenhagen", "Denmark"),
    ("the Charles Bridge", "Prague", "the Czech Republic"),
    ("the Rijksmuseum", "Amsterdam", "the Netherlands"),
    ("the Belem Tower", "Lisbon", "Portugal"),
    ("the Great Sphinx", "Giza", "Egypt"),
    ("the Table Mountain", "Cape Town", "South Africa"),
    ("the Christ the Redeemer statue", "Rio de Janeiro", "Brazil"),
    ("the CN Tower", "Toronto", "Canada"),
    ("the Atomium", "Brussels", "Belgium"),
    ("the Schönbrunn Palace", "Vienna", "Austria"),
)


@dataclass(frozen=True)
class Options:
    """Options of task `nolima`.

    Attributes:
        hops: 1: the question names the city of the landmark; 2: its country.
        inverted: Whether the fact names the landmark before the person.
        other_facts: Facts about other people and landmarks in the text.
    """

    hops: Literal[1, 2] = 1
    inverted: bool = False
    other_facts: Literal[0, 1, 2, 4, 8] = 2

    def __post_init__(self) -> None:
        check_fields(self, "options of task 'nolima'")


def example(options: Options, room: Room, seed: Seed) -> Example:
    """Facts about people in text, and a question about one of them."""
    return room.fill(lambda units: _build(options, room, str(seed), units))


def _build(options: Options, room: Room, seed: str, units: int) -> Example:
    rng = random.Random(seed)
    count = 1 + options.other_facts
    landmarks, people = rng.sample(_LANDMARKS, count), rng.sample(NAMES, count)
    depths = [rng.random() for _ in range(count)]
    facts = [_fact(options, person, place[0]) for person, place in zip(people, landmarks, strict=True)]
    text = " ".join(insert_at(first(sentences(rng), units), list(zip(depths, facts, strict=True))))
    question = f"Which person has been to {landmarks[0][options.hops]}? Answer with the name only."
    return Example(
        turns=(Message("user", f"Read the text and answer the question.\n\n{text}\n\nQuestion: {question}"),),
        answer=f" {people[0]}",
        max_tokens=room.answer_tokens(people[0], _ANSWER_TOKENS),
        answer_start="\nAnswer:",
        depth=depths[0],
        details={"references": [people[0]]},
    )


def _fact(options: Options, person: str, landmark: str) -> str:
    if options.inverted:
        return f"Right across from {landmark} there is a flat, and {person} lives in it."
    return f"These days {person} lives in a flat right across from {landmark}."


def score(example: Example, text: str) -> float:
    """1 if the name is a word of the text."""
    name = example.details["references"][0]
    return float(re.search(rf"\b{name}\b", text, re.IGNORECASE) is not None)


PLUGIN = Task(version=1, options=Options, example=example, score=score)
