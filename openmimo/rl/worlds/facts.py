"""A generated world of entities and facts, with a page per entity and multi-hop questions (section 4.3.2).

A question is built backwards from its answer: an entity whose relation points to the answer replaces it, then an entity
that points to that one, and so on. Every relation has one value, so the answer is unique. Names and facts are invented,
so a model cannot know them from training.
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
    """An entity of a world.

    Attributes:
        page: The id of its page.
        kind: One of KINDS.
        name: Unique in the world.
        year: Stated on the page.
        trait: One of SUBJECTS.
        facts: Relation to the name of another entity.
    """

    page: str
    kind: str
    name: str
    year: int
    trait: str
    facts: Mapping[str, str]

    def text(self) -> str:
        """The text of the page."""
        sentences = [TRAITS[self.kind][0].format(name=self.name, year=self.year, trait=self.trait)]
        for relation, value in self.facts.items():
            sentences.append(RELATIONS[self.kind][relation][1].format(name=self.name, value=value))
        return "\n".join([f"{self.name} ({self.kind})", *sentences])


@dataclass(frozen=True)
class FactQuestion:
    """A question about a world.

    Attributes:
        prompt: The question.
        answer: The name of an entity.
        path: (entity, relation) from the first look-up to the one whose value is the answer.
        first: The words that identify the first entity.
    """

    prompt: str
    answer: str
    path: tuple[tuple[str, str], ...]
    first: str


class FactWorld:
    """Entities by name, with a search over their pages that weights rare words higher."""

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
        """The ids of the best matching pages, at most `most`."""
        words = set(_WORD.findall(query.lower())) & set(self._num_pages)
        weights = {word: math.log(1 + len(self.pages) / self._num_pages[word]) for word in words}
        scores = {page: self._score(counts, weights) for page, counts in self._words.items()}
        found = [page for page in sorted(scores, key=lambda page: -scores[page]) if scores[page] > 0.0]
        return found[:most]

    def question(self, rng: random.Random, depth: int, obfuscation: int) -> FactQuestion | None:
        """Draws a question of `depth` hops; None if this draw fails.

        Args:
            rng: Source of randomness.
            depth: Number of look-ups.
            obfuscation: 0 names the first entity, 1 describes it, 2 describes it with a range of years.
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
        first = self._described(rng, self.entities[name], obfuscation)
        if first is None:
            return None
        words = first
        for entity, relation in path:
            words = RELATIONS[self.entities[entity].kind][relation][2].format(x=words)
        return FactQuestion(f"What is the name of {words}?", answer, tuple(path), first)

    def _score(self, counts: Counter, weights: Mapping[str, float]) -> float:
        return sum(weight * min(counts[word], 2) for word, weight in weights.items())

    def _described(self, rng: random.Random, entity: Entity, obfuscation: int) -> str | None:
        """A description that fits only this entity; None if there is none."""
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
    """The world of this size and seed (deterministic)."""
    rng = random.Random(f"facts {seed}")
    names = _names(rng, num_entities)
    kinds = [KINDS[number % len(KINDS)] for number in range(num_entities)]
    of_kind = {kind: [name for name, its_kind in zip(names, kinds, strict=True) if its_kind == kind] for kind in KINDS}
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
    """Invented names of two words; no word is used twice."""
    words: list[str] = []
    seen = set(SUBJECTS)
    while len(words) < 2 * count:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
        word = "".join(syllables) + rng.choice(("", "n", "r", "l", "s"))
        if word not in seen:
            seen.add(word)
            words.append(word.capitalize())
    return [f"{first} {second}" for first, second in zip(words[::2], words[1::2], strict=True)]
