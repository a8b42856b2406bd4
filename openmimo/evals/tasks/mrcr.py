"""Multi-round coreference (MRCR): one of several drafts of the same request in a long conversation is to be repeated.

Definition: OpenAI MRCR and Vodrahalli et al. 2024 (2409.12640). The user asks for pieces of several forms about several
subjects, and for one of them two to eight times. The last turn asks for the i-th of these after a random prefix. The
score is the ratio of `difflib.SequenceMatcher` to the draft, or 0 without the prefix. The pieces are generated.
"""

import difflib
import random
import string
from dataclasses import dataclass
from typing import Literal

from openmimo.core.fields import check_fields
from openmimo.core.records import Message
from openmimo.evals.task import Example, Room, Seed, Task
from openmimo.evals.tasks._words import ADJECTIVES, NAMES, NOUNS, PLACES, VERBS

_FORMS = (
    "poem",
    "short story",
    "letter",
    "speech",
    "riddle",
    "blog post",
    "news article",
    "song",
    "play scene",
    "essay",
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_PREFIX_CHARACTERS = 10
_LEAST_SENTENCES, _MOST_SENTENCES = 3, 6


@dataclass(frozen=True)
class Options:
    """Options of task `mrcr`.

    Attributes:
        needles: How often the same piece is asked for.
    """

    needles: Literal[2, 4, 8] = 2

    def __post_init__(self) -> None:
        check_fields(self, "options of task 'mrcr'")


def example(options: Options, room: Room, seed: Seed) -> Example:
    """A conversation that ends with the request to repeat one draft."""
    return room.fill(lambda units: _build(options, room, str(seed), units))


def _build(options: Options, room: Room, seed: str, others: int) -> Example:
    rng = random.Random(seed)
    asked = (rng.choice(_FORMS), _subject(rng))
    number = rng.randrange(options.needles)
    prefix = "".join(rng.choices(string.ascii_letters + string.digits, k=_PREFIX_CHARACTERS))
    drafts = [_piece(*asked, rng) for _ in range(options.needles)]
    places = sorted(rng.random() for _ in drafts)
    pieces = [(place, *asked, draft) for place, draft in zip(places, drafts, strict=True)]
    for index in range(others):
        form, subject = rng.choice(_FORMS), _subject(rng)
        if (form, subject) != asked:
            pieces.append((index / max(others, 1), form, subject, _piece(form, subject, rng)))
    pieces.sort(key=lambda piece: piece[0])
    turns = []
    for _, form, subject, piece in pieces:
        turns += [Message("user", f"Write a {form} about {subject}."), Message("assistant", piece)]
    request = (
        f"Begin your answer with {prefix}, and then repeat the {_ORDINALS[number]} {asked[0]} about {asked[1]} word "
        "for word. Write nothing else."
    )
    answer = prefix + drafts[number]
    return Example(
        turns=(*turns, Message("user", request)),
        answer=answer,
        max_tokens=room.answer_tokens(answer, 0),
        depth=places[number],
        details={"prefix": prefix, "drafts": drafts, "number": number},
    )


def _subject(rng: random.Random) -> str:
    return f"{rng.choice(NOUNS)}s"


def _piece(form: str, subject: str, rng: random.Random) -> str:
    """A piece of some sentences that differ in names and words."""
    lines = [f"This is a {rng.choice(ADJECTIVES)} {form} about {subject}."]
    for _ in range(rng.randint(_LEAST_SENTENCES, _MOST_SENTENCES)):
        lines.append(
            f"{rng.choice(NAMES)} {rng.choice(VERBS)} a {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} "
            f"{rng.choice(PLACES)}."
        )
    return " ".join(lines)


def score(example: Example, text: str) -> float:
    """The similarity of the text after the prefix to the draft; 0 without the prefix."""
    prefix = example.details["prefix"]
    text = text.strip()
    if not text.startswith(prefix):
        return 0.0
    return _ratio(text.removeprefix(prefix), example.details["drafts"][example.details["number"]])


def metrics(example: Example, text: str) -> dict[str, float]:
    """Whether the text has the prefix, and whether the draft that it resembles most is the one asked for."""
    prefix, drafts = example.details["prefix"], example.details["drafts"]
    text = text.strip()
    ratios = [_ratio(text.removeprefix(prefix), draft) for draft in drafts]
    chosen = max(range(len(drafts)), key=lambda number: ratios[number])
    return {
        "has_prefix": float(text.startswith(prefix)),
        "right_draft": float(ratios[chosen] > 0.5 and chosen == example.details["number"]),
    }


def _ratio(text: str, draft: str) -> float:
    text = text[: 2 * len(draft)]  # the time is quadratic in the length; a longer text is wrong
    return difflib.SequenceMatcher(None, text, draft).ratio()


PLUGIN = Task(version=1, options=Options, example=example, score=score, metrics=metrics)
