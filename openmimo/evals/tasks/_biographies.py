"""Questions over generated biographies, as a replacement of RULER's two tasks over SQuAD and HotpotQA.

Each document describes one person. A question of one hop asks for a fact of a person, a question of two hops for a fact
of a person's teacher.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from openmimo.core.records import Message
from openmimo.evals.task import Example, NoOptions, Room, Seed, Task
from openmimo.evals.tasks._filler import first
from openmimo.evals.tasks._scoring import any_found
from openmimo.evals.tasks._words import ADJECTIVES, NAMES, NOUNS

_ANSWER_TOKENS = 32
_FACTS = {
    "town": ("was born in {value}", "In which town was {person} born?"),
    "trade": ("earned a living as a {value}", "What was the trade of {person}?"),
    "hobby": ("collected {value}s for many years", "What did {person} collect?"),
    "ship": ("sailed once on a ship named {value}", "What was the name of the ship on which {person} sailed?"),
}
_TRADES = "baker weaver potter printer carpenter sailor tailor teacher gardener painter clockmaker miller"


@dataclass(frozen=True)
class _Person:
    name: str
    facts: dict[str, str]
    teacher: str

    def text(self) -> str:
        """The biography."""
        lines = [f"{self.name} {_FACTS[kind][0].format(value=value)}." for kind, value in self.facts.items()]
        return " ".join([lines[0], f"The teacher of {self.name} was {self.teacher}.", *lines[1:]])


def biography_task(hops: int) -> Task:
    """The task with questions of one or two hops."""

    def example(options: NoOptions, room: Room, seed: Seed) -> Example:
        return room.fill(lambda units: _build(hops, room, str(seed), units), least=hops)

    return Task(version=1, options=NoOptions, example=example, score=any_found)


def _build(hops: int, room: Room, seed: str, units: int) -> Example:
    rng = random.Random(seed)
    names = _people(rng)
    order = first(names, units)
    people = [_Person(name, _draw_facts(rng), next(names)) for name in order[hops - 1 :]]
    asked = people[0]
    documents, name = list(people), asked.name
    if hops == 2:
        name = order[0]
        documents.append(_Person(name, _draw_facts(rng), asked.name))
    kind = rng.choice(list(_FACTS))
    rng.shuffle(documents)
    question = _FACTS[kind][1].format(person=name if hops == 1 else f"the teacher of {name}")
    text = "\n\n".join(f"Document {number}:\n{person.text()}" for number, person in enumerate(documents, start=1))
    answer = asked.facts[kind]
    return Example(
        turns=(Message("user", f"Answer the question with the documents.\n\n{text}\n\nQuestion: {question}"),),
        answer=f" {answer}",
        max_tokens=room.answer_tokens(answer, _ANSWER_TOKENS),
        answer_start="\nAnswer:",
        depth=documents.index(asked) / max(len(documents) - 1, 1),
        details={"references": [answer]},
    )


def _people(rng: random.Random) -> Iterator[str]:
    """Distinct names of people."""
    used: set[str] = set()
    while True:
        name = f"{rng.choice(NAMES)} {rng.choice(ADJECTIVES).title()}{rng.choice(NOUNS)}"
        if name not in used:
            used.add(name)
            yield name


def _draw_facts(rng: random.Random) -> dict[str, str]:
    values = {
        "town": f"{rng.choice(NOUNS).title()} {rng.choice(('Hill', 'Bay', 'Ford', 'Bridge', 'Field'))}",
        "trade": f"{rng.choice(ADJECTIVES)} {rng.choice(_TRADES.split())}",
        "hobby": f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
        "ship": f"{rng.choice(ADJECTIVES).title()} {rng.choice(NAMES)}",
    }
    kinds = list(values)
    rng.shuffle(kinds)
    return {kind: values[kind] for kind in kinds}
