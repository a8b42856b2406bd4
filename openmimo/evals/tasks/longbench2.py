"""LongBench v2 from a local file: questions with four choices about a long text (2412.15204).

The file is the `data.json` of the benchmark: a list of objects, or one object a line. A text that does not fit loses
its middle. Metrics: the score of easy and hard questions, and of short, medium and long texts.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

from openmimo.core.errors import DataError
from openmimo.core.files import parse_json, read_text
from openmimo.core.records import Message
from openmimo.evals.task import Example, Room, Seed, Task

_LETTERS = "ABCD"
_KEYS = ("question", "context", "answer", *(f"choice_{letter}" for letter in _LETTERS))
_ANSWER_TOKENS = 128
_ANSWER = re.compile(r"correct answer is:?\s*\**\(?([A-D])\b", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """Options of task `longbench2`.

    Attributes:
        file: The local `data.json`.
    """

    file: str = ""


def num_examples(options: Options) -> int:
    """Number of questions in the file."""
    return len(_rows(options.file))


def example(options: Options, room: Room, seed: Seed) -> Example:
    """Question number `index` of the file; the seed has no effect."""
    row = _rows(options.file)[seed[2]]
    choices = "\n".join(f"({letter}) {row[f'choice_{letter}']}" for letter in _LETTERS)
    context = str(row["context"])

    def build(characters: int) -> Example:
        text = (
            context if 2 * characters >= len(context) else context[:characters] + context[len(context) - characters :]
        )
        prompt = (
            f"Read the text and answer the question.\n\n<text>\n{text}\n</text>\n\nQuestion: {row['question']}\n"
            f'{choices}\n\nEnd with a sentence of this form: "The correct answer is (X)".'
        )
        return Example(
            turns=(Message("user", prompt),),
            answer=f" ({row['answer']})" if room.form == "base" else f"The correct answer is ({row['answer']})",
            max_tokens=_ANSWER_TOKENS,
            answer_start="\n\nThe correct answer is",
            details={"form": room.form, **{key: str(row.get(key, "")) for key in ("answer", "difficulty", "length")}},
        )

    whole = build(len(context))
    if len(room.prompt_ids(whole)) + whole.max_tokens <= room.length:
        return whole
    return room.fill(build)


def score(example: Example, text: str) -> float:
    """1 if the text names the right letter."""
    found = _ANSWER.search(f"correct answer is{text}" if example.details["form"] == "base" else text)
    return float(found is not None and found[1].upper() == example.details["answer"])


def metrics(example: Example, text: str) -> dict[str, float]:
    """The score under the question's difficulty and the class of its length."""
    value = score(example, text)
    return {example.details[key]: value for key in ("difficulty", "length") if example.details[key]}


@functools.cache
def _rows(file: str) -> list[dict[str, Any]]:
    if not file:
        raise DataError("Task 'longbench2' has no file. Give the local data.json: --options file PATH.")
    text = read_text(file, DataError)
    is_list = text.lstrip().startswith("[")
    lines = [line for line in text.splitlines() if line.strip()]
    rows = parse_json(text, file, DataError) if is_list else [parse_json(line, file, DataError) for line in lines]
    for number, row in enumerate(rows):
        missing = [key for key in _KEYS if not isinstance(row, dict) or not isinstance(row.get(key), str)]
        if missing or row["answer"] not in _LETTERS:
            raise DataError(f"{file}, entry {number}: {', '.join(missing) or 'answer'} is missing or wrong.")
    if not rows:
        raise DataError(f"{file} has no questions.")
    return rows


PLUGIN = Task(version=1, options=Options, example=example, score=score, metrics=metrics, num_examples=num_examples)
