"""RULER common words: ten words occur more often than the others in a numbered list.

Definition: Hsieh et al. 2024 (2404.06654): the common words 30 times and the others 3 times; below 4096 tokens 6 times
and once. The prompt begins with one solved example. The wording is ours, and the words are made up.
"""

import random
from collections.abc import Iterator

from openmimo.core.records import Message
from openmimo.evals.task import Example, NoOptions, Room, Seed, Task
from openmimo.evals.tasks._filler import first
from openmimo.evals.tasks._scoring import share_found
from openmimo.evals.tasks._words import NOUNS, made_up_words

_NUM_COMMON, _ANSWER_TOKENS = 10, 120
_LONG = 4096
_QUESTION = "Which ten words occur most often in the list above?"
_ANSWER_START = "\nThe ten words that occur most often are:"


def example(options: NoOptions, room: Room, seed: Seed) -> Example:
    """A solved list, then a longer list and the question."""
    return room.fill(lambda units: _build(room, str(seed), units))


def _build(room: Room, seed: str, units: int) -> Example:
    rng = random.Random(seed)
    is_long = room.length >= _LONG
    words = _words(rng)
    solved_common, solved_list = _list(rng, words, 40 if is_long else 10, *((10, 3) if is_long else (3, 1)))
    common, numbered = _list(rng, words, units, *((30, 3) if is_long else (6, 1)))
    prompt = (
        "Some words occur more often than others in the numbered lists. Find the ten most frequent ones.\n"
        f"{solved_list}\n{_QUESTION}{_ANSWER_START} {_numbered(solved_common)}\n\n{numbered}\n{_QUESTION}"
    )
    answer = f" {_numbered(common)}"
    return Example(
        turns=(Message("user", prompt),),
        answer=answer,
        max_tokens=room.answer_tokens(answer, _ANSWER_TOKENS),
        answer_start=_ANSWER_START,
        details={"references": common},
    )


def _words(rng: random.Random) -> Iterator[str]:
    """Our nouns in random order, then made-up words."""
    yield from rng.sample(NOUNS, len(NOUNS))
    yield from (word for word in made_up_words(rng, 3) if word not in NOUNS)


def _list(rng: random.Random, words: Iterator[str], others: int, often: int, seldom: int) -> tuple[list[str], str]:
    """The common words and the shuffled list."""
    common = first(words, _NUM_COMMON)
    entries = common * often + first(words, others) * seldom
    rng.shuffle(entries)
    return common, _numbered(entries)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


PLUGIN = Task(version=1, options=NoOptions, example=example, score=share_found)
