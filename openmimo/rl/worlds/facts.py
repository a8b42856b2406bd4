"""A generated world of entities and facts, with a page for each entity and questions of many hops (section 4.3.2).

A question is made from its answer backwards: an entity that points to the answer stands for it, then one that points to
that, and so on; every relation has one value, so the answer is unique. Names and facts are invented, so that nothing a
model has read helps.
"""

import functools
import math
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

MAX_DEPTH = 6
MIN_ENTITIES = 20

KINDS = ("person", "city", "company", "book")
# kind -> relation -> (kind of its value, sentence of the page, words of a question)
RELATIONS: dict[str, dict[str, tuple[str, str, str]]] = {
    "person": {
        "birthplace": ("city", "{name} was born in {value}.", "the city where {x} was born"),
        "employer": ("company", "{name} works for {value}.", "the company that {x} works for"),
        "teacher": ("person", "{name} was taught by {value}.", "the person who taught {x}"),
    },
    "city": {
        "mayor": ("person", "The mayor of {name} is {value}.", "the mayor of {x}"),
        "twin": ("city", "{name} is twinned with {value}.", "the city that {x} is twinned with"),
    },
    "company": {
        "seat": ("city", "{name} has its seat in {value}.", "the city where {x} has its seat"),
        "founder": ("person", "{name} was founded by {value}.", "the founder of {x}"),
    },
    "book": {
        "author": ("person", "{name} was written by {value}.", "the author of {x}"),
        "publisher": ("company", "{name} was published by {value}.", "the publisher of {x}"),
    },
}
# kind -> (sentence of the page, description in a question)
TRAITS = {
    "person": (
        "{name} was born in the year {year} and collects {trait}.",
        "the person who collects {trait}, born {when}",
    ),
    "city": (
        "{name} got its charter in {year} and is known for {trait}.",
        "the city known for {trait}, chartered {when}",
    ),
    "company": (
        "{name} was set up in {year} and trades in {trait}.",
        "the company that trades in {trait}, set up {when}",
    ),
    "book": ("{name} came out in {year} and is about {trait}.", "the book about {trait} that came out {when}"),
}
SUBJECTS = (
    "amber", "bells", "beetles", "bridges", "candles", "clocks", "coins", "copper", "ferns", "glass", "honey", "kites",
    "lace", "lanterns", "maps", "masks", "mosses", "paper", "pearls", "rope", "salt", "shells", "silk", "violins",
)  # fmt: skip
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Entity:
    """page: the id of its page. facts: the names of other entities by relation."""

    page: str
    kind: str
    name: str
    year: int
    trait: str
    facts: Mapping[str, str]

    def text(self) -> str:
        """Its page."""
        sentences = [TRAITS[self.kind][0].format(name=self.name, year=self.year, trait=self.trait)]
        for relation, value in self.facts.items():
            sentences.append(RELATIONS[self.kind][relation][1].format(name=self.name, value=value))
        return "\n".join([f"{self.name} ({self.kind})", *sentences])


@dataclass(frozen=True)
class FactQuestion:
    """A question about a world.

    path: (entity, relation) from the first look-up to the one whose value is the answer. first: the words that lead to
    the first entity.
    """

    prompt: str
    answer: str
    path: tuple[tuple[str, str], ...]
    first: str


class FactWorld:
    """Entities by name, and a search over their pages by shared words, rare words first."""

    def __init__(self, entities: list[Entity]):
        self.entities = {entity.name: entity for entity in entities}
        self.pages = {entity.page: entity.text() for entity in entities}
        self._words = {page: Counter(_WORD.findall(text.lower())) for page, text in self.pages.items()}
        self._num_pages = Counter(word for counts in self._words.values() for word in counts)
        self._sources: dict[str, list[tuple[str, str]]] = {name: [] for name in self.entities}
        for entity in entities:
            for relation, value in entity.facts.items():
                self._sources[value].append((entity.name, relation))

    def search(self, query: str, most: int) -> list[str]:
        """The ids of the pages that fit best, at most so many."""
        words = set(_WORD.findall(query.lower())) & set(self._num_pages)
        weights = {word: math.log(1 + len(self.pages) / self._num_pages[word]) for word in words}
        scores = {page: self._score(counts, weights) for page, counts in self._words.items()}
        found = [page for page in sorted(scores, key=lambda page: -scores[page]) if scores[page] > 0.0]
        return found[:most]

    def question(self, rng: random.Random, depth: int, obfuscation: int) -> FactQuestion | None:
        """A question of `depth` hops, or None if this draw comes to nothing.

        obfuscation: 0 gives the first entity's name, 1 describes it instead, 2 is vague about the year, too.
        """
        answer = name = rng.choice(list(self.entities))
        path: list[tuple[str, str]] = []
        for _ in range(depth):
            seen = {answer, *(entity for entity, _ in path)}
            sources = [source for source in self._sources[name] if source[0] not in seen]
            if not sources:
                return None
            path.insert(0, rng.choice(sources))
            name = path[0][0]
        words = first = self._described(rng, self.entities[name], obfuscation)
        if words is None:
            return None
        for entity, relation in path:
            words = RELATIONS[self.entities[entity].kind][relation][2].format(x=words)
        return FactQuestion(f"What is the name of {words}?", answer, tuple(path), first)

    def _score(self, counts: Counter, weights: Mapping[str, float]) -> float:
        return sum(weight * min(counts[word], 2) for word, weight in weights.items())

    def _described(self, rng: random.Random, entity: Entity, obfuscation: int) -> str | None:
        """Words for an entity that fit no other one; None if there are none."""
        if not obfuscation:
            return entity.name
        earliest = entity.year - rng.randint(0, 10) if obfuscation > 1 else entity.year
        latest = earliest + 10 if obfuscation > 1 else entity.year
        fitting = [
            other
            for other in self.entities.values()
            if (other.kind, other.trait) == (entity.kind, entity.trait) and earliest <= other.year <= latest
        ]
        when = f"in {earliest}" if earliest == latest else f"between {earliest} and {latest}"
        return TRAITS[entity.kind][1].format(trait=entity.trait, when=when) if len(fitting) == 1 else None


@functools.lru_cache(maxsize=8)
def fact_world(num_entities: int, seed: int) -> FactWorld:
    """The world of that size and seed, always the same one."""
    rng = random.Random(f"facts {seed}")
    names = _names(rng, num_entities)
    kinds = [KINDS[number % len(KINDS)] for number in range(num_entities)]
    of_kind = {kind: [name for name, own in zip(names, kinds, strict=True) if own == kind] for kind in KINDS}
    numbers = rng.sample(range(1000, 1000 + 9 * num_entities), num_entities)
    entities = []
    for name, kind, number in zip(names, kinds, numbers, strict=True):
        facts = {
            relation: rng.choice([other for other in of_kind[value_kind] if other != name])
            for relation, (value_kind, _, _) in RELATIONS[kind].items()
        }
        entities.append(Entity(f"page-{number}", kind, name, rng.randint(1800, 1999), rng.choice(SUBJECTS), facts))
    return FactWorld(entities)


def _names(rng: random.Random, count: int) -> list[str]:
    """Invented names of two words, no word in two of them."""
    words: list[str] = []
    seen = set(SUBJECTS)
    while len(words) < 2 * count:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
        word = "".join(syllables) + rng.choice(("", "n", "r", "l", "s"))
        if word not in seen:
            seen.add(word)
            words.append(word.capitalize())
    return [f"{first} {second}" for first, second in zip(words[::2], words[1::2], strict=True)]
