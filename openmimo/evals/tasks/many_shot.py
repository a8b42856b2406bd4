"""HELMET-type in-context learning: requests of several topics with arbitrary numeric labels, and one request to label.

As many labeled requests as fit come before the question (2410.02694, ICL). Labels are a random permutation, so only the
prompt says which topic has which number.
"""

import random
from dataclasses import dataclass
from typing import Annotated

from openmimo.core.fields import Bounds, check_fields
from openmimo.core.records import Message
from openmimo.evals.task import Example, Room, Seed, Task
from openmimo.evals.tasks._scoring import first_number_matches

_TOPICS = {
    "weather": "rain snow fog wind sunshine frost",
    "music": "song album concert melody band chorus",
    "food": "soup bread salad noodles cheese pancake",
    "travel": "flight train hotel passport luggage visa",
    "money": "loan invoice salary deposit refund budget",
    "sport": "tennis match goal race medal coach",
    "health": "fever doctor pill bandage allergy cough",
    "school": "exam homework lesson pupil grade essay",
    "pets": "puppy kitten hamster leash aquarium parrot",
    "plants": "rose seed compost hedge tulip weed",
    "cars": "engine tire brake garage fuel clutch",
    "phones": "battery screen ringtone call charger contact",
    "film": "actor scene trailer director ticket sequel",
    "house": "roof kitchen carpet window plumber lease",
    "law": "court judge contract witness lawyer appeal",
    "space": "planet comet orbit rocket telescope star",
}
_PATTERNS = (
    "Can you tell me about the {word}?",
    "I have a question: what about the {word}?",
    "Please help me with the {word}.",
    "My friend asked me about a {word} yesterday.",
    "I need a {word} soon.",
    "Do you remember the {word} that we discussed?",
    "Is there something new about the {word}?",
    "A {word}, please.",
)


@dataclass(frozen=True)
class Options:
    """Options of task `many_shot`.

    Attributes:
        topics: Number of labels; a guess is right with probability 1 / topics.
    """

    topics: Annotated[int, Bounds(least=2, most=len(_TOPICS))] = 8

    def __post_init__(self) -> None:
        check_fields(self, "options of task 'many_shot'")


def example(options: Options, room: Room, seed: Seed) -> Example:
    """Labeled requests, each topic about equally often, and one more request."""
    return room.fill(lambda units: _build(options, room, str(seed), units), least=options.topics)


def _build(options: Options, room: Room, seed: str, count: int) -> Example:
    rng = random.Random(seed)
    topics = rng.sample(list(_TOPICS), options.topics)  # the label of a topic is its position
    asked = rng.randrange(options.topics)
    question = _request(topics[asked], rng)
    labels = [number % options.topics for number in range(count)]
    rng.shuffle(labels)
    shown = [f"{_request(topics[label], rng)}\nlabel: {label}" for label in labels]
    prompt = "\n\n".join(["Label the last request like the others, with a number.", *shown, question])
    return Example(
        turns=(Message("user", prompt),),
        answer=str(asked),
        max_tokens=room.answer_tokens(f" {asked}", 4),
        answer_start="\nlabel:",
    )


def _request(topic: str, rng: random.Random) -> str:
    return rng.choice(_PATTERNS).format(word=rng.choice(_TOPICS[topic].split()))


PLUGIN = Task(version=1, options=Options, example=example, score=first_number_matches)
