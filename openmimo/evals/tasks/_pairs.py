"""A JSON object of UUIDs; the value of one key is asked for (InfiniteBench Retrieve.KV, HELMET JSON KV)."""

import json
import random
import re

from openmimo.core.records import Message
from openmimo.evals.task import Example, NoOptions, Room, Seed, Task
from openmimo.evals.tasks._words import identifier

_ANSWER_TOKENS = 50


def pair_task(num_shown: int) -> Task:
    """The task with `num_shown` solved questions before the last."""

    def example(options: NoOptions, room: Room, seed: Seed) -> Example:
        return room.fill(lambda units: _build(num_shown, room, str(seed), units), least=num_shown + 1)

    return Task(version=1, options=NoOptions, example=example, score=score)


def score(example: Example, text: str) -> float:
    """1 if the answer is a word of the text, where spaces and punctuation end words."""
    return float(example.answer in re.split(r"[\s,.:;\"'{}\[\]()]+", text))


def _build(num_shown: int, room: Room, seed: str, units: int) -> Example:
    rng = random.Random(seed)
    pairs = {identifier(rng): identifier(rng) for _ in range(units)}
    keys = list(pairs)
    *shown, asked = rng.sample(range(units), num_shown + 1)
    questions = [_question(keys[index]) + f" {pairs[keys[index]]}" for index in shown]
    prompt = "\n".join(
        ["Return the value of a key in this JSON object.", json.dumps(pairs), *questions, f'Key: "{keys[asked]}"']
    )
    answer = pairs[keys[asked]]
    return Example(
        turns=(Message("user", prompt),),
        answer=answer,
        max_tokens=room.answer_tokens(answer, _ANSWER_TOKENS),
        answer_start="\nThe value of this key is:",
        depth=asked / max(units - 1, 1),
    )


def _question(key: str) -> str:
    return f'Key: "{key}"\nThe value of this key is:'
