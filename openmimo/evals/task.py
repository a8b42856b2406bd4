"""The interface of evaluation tasks: a file in `openmimo/evals/tasks` exports `PLUGIN`, a Task.

An example is a pure function of options, tokenizer, length, form, seed and index. Prompt and answer never take more
than `length` tokens of the model's own tokenizer. A text task fills the room with `Room.fill`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from openmimo.core.errors import DataError
from openmimo.core.records import Message
from openmimo.core.registry import Registry
from openmimo.data.chat.conversation import encode_prompt
from openmimo.data.tokenizer import Tokenizer

Form: TypeAlias = Literal["base", "chat"]
Seed: TypeAlias = tuple[int, int, int]
_MAX_ROUNDS = 10
_LEAST_SLOPE = 0.1  # tokens of a unit
_SLACK = 1 / 1024  # unused share of the length at which `fill` stops early
_SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System"}


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        answer: A text that scores 1.
        max_tokens: Maximum number of tokens of the model's answer.
        turns: The prompt as a conversation; the last turn is the user's.
        token_ids: The prompt as token ids, in place of `turns`.
        answer_start: The beginning of the answer, with white space before it. A base model continues it.
        depth: Relative position of the (first) fact in the prompt (0 start, 1 end); None without such a position.
        details: Additional data for scoring.
    """

    answer: str
    max_tokens: int
    turns: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()
    answer_start: str = ""
    depth: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def base_text(self) -> str:
        """The prompt for a base model: the text itself, or a transcript of several turns."""
        if len(self.turns) == 1:
            return self.turns[0].content + self.answer_start
        lines = [f"{_SPEAKERS[turn.role]}: {turn.content}" for turn in self.turns]
        return "\n\n".join([*lines, "Assistant:"]) + self.answer_start


@dataclass(frozen=True)
class Room:
    """The tokens that prompt and answer may take.

    Attributes:
        tokenizer: The model's tokenizer.
        length: Maximum tokens of prompt and answer.
        form: "base" continues the text of the prompt; "chat" applies the chat template.
    """

    tokenizer: Tokenizer
    length: int
    form: Form = "base"

    def prompt_ids(self, example: Example) -> list[int]:
        """The token ids of the prompt."""
        if example.token_ids:
            return list(example.token_ids)
        if self.form == "chat":
            return encode_prompt(self.tokenizer, example.turns)
        return self.tokenizer.encode(example.base_text())

    def answer_tokens(self, answer: str, least: int) -> int:
        """The budget of an answer: `least`, or a few more than the tokens of `answer` if it is longer."""
        return max(least, len(self.tokenizer.encode(answer)) + 4)

    def fill(self, build: Callable[[int], Example], least: int = 0) -> Example:
        """The example with the largest number of units of filler that fits.

        The size is interpolated, so only a few prompts are built and the time is linear in the length.

        Args:
            build: Returns the example with a number of units. Its size grows about linearly.
            least: The smallest number of units.

        Raises:
            DataError: The example does not fit with `least` units.
        """
        best = build(least)
        fitting, tokens = least, self._tokens(best)
        if tokens > self.length:
            raise DataError(f"The task needs at least {tokens} tokens; the length is {self.length}. Give more.")
        smallest, units = tokens, least + 8
        over: tuple[int, int] | None = None
        for _ in range(_MAX_ROUNDS):
            example = build(units)
            new = self._tokens(example)
            if new <= self.length:
                best, fitting, tokens = example, units, new
            else:
                over = units, new
            if over is None:
                # from the smallest size, because the sizes of two similar numbers of units differ by chance
                slope = max((new - smallest) / (units - least), _LEAST_SLOPE)
            else:
                slope = (over[1] - tokens) / (over[0] - fitting)
            left = self.length - tokens
            if (over is not None and over[0] - fitting <= 1) or left < max(slope, self.length * _SLACK):
                break
            units = fitting + max(int(left / slope), 1)
            if over is not None:
                units = min(units, over[0] - 1)
        return best

    def _tokens(self, example: Example) -> int:
        return len(self.prompt_ids(example)) + example.max_tokens


def _no_metrics(example: Example, text: str) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Task:
    """An evaluation task.

    Attributes:
        version: Incremented when scores are no longer comparable.
        options: A frozen dataclass of settings.
        example: `example(options, room, seed)` returns an example. It is a pure function of its arguments.
        score: `score(example, text)` returns 0 to 1. No text raises.
        metrics: `metrics(example, text)` returns other measures, each averaged over the examples that have it.
        num_examples: Number of examples of a finite task with these options; None for an infinite task.
    """

    version: int
    options: type
    example: Callable[[Any, Room, Seed], Example]
    score: Callable[[Example, str], float]
    metrics: Callable[[Example, str], dict[str, float]] = _no_metrics
    num_examples: Callable[[Any], int] | None = None


TASKS: Registry[Task] = Registry("openmimo.evals.tasks", Task)


@dataclass(frozen=True)
class Score:
    """The mean score at one length with its 95 % Wilson interval."""

    length: int
    examples: int
    mean: float
    low: float
    high: float


def score_of(length: int, values: list[float]) -> Score:
    """The score of the values of single examples, of which there is at least one."""
    mean = sum(values) / len(values)
    return Score(length, len(values), mean, *wilson_interval(mean, len(values)))


def wilson_interval(mean: float, examples: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share observed over `examples` trials."""
    z = 1.96
    center = (mean + z * z / (2 * examples)) / (1 + z * z / examples)
    spread = z / (1 + z * z / examples) * math.sqrt(mean * (1 - mean) / examples + z * z / (4 * examples**2))
    # rounding may put the mean slightly outside the interval; plots need it inside
    return min(max(0.0, center - spread), mean), max(min(1.0, center + spread), mean)


@dataclass(frozen=True)
class NoOptions:
    """A task without options."""
