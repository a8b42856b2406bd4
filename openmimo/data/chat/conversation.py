"""Conversations as token ids with a mask of the tokens that the model writes, for fine-tuning and rollout prompts.

An assistant turn begins with the template's generation prompt and ends with a stop token. The text of a conversation
cannot contain these tokens, because `encode_chat` takes special tokens from the template only.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from openmimo.core.errors import DataError
from openmimo.core.records import Message
from openmimo.data.chat.template import encode_chat, message_dict
from openmimo.data.tokenizer import THINK_END, THINK_START, Tokenizer

AnyMessage = Message | Mapping[str, Any]


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Iterable[AnyMessage],
    *,
    tools: Iterable[Mapping[str, Any]] = (),
    enable_thinking: bool = False,
) -> list[int]:
    """Return the ids of a conversation up to the model's answer.

    They are a prefix of the result of `encode_conversation` for the same messages and the answer.
    """
    turns = [_plain_turn(message, enable_thinking) for message in messages]
    return encode_chat(tokenizer, turns, tools=tools, enable_thinking=enable_thinking)


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Iterable[AnyMessage],
    *,
    tools: Iterable[Mapping[str, Any]] = (),
    enable_thinking: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a conversation and the mask of the tokens that the assistant writes.

    The mask covers the assistant's text, its tool calls and the token that ends its turn. It excludes the generation
    prompt, which without thinking includes the empty thinking block. A turn with OpenAI's `weight: 0` is excluded.

    Without thinking, reasoning is dropped. With thinking, reasoning is included, and only turns after the last question
    are in the mask: the template hides the reasoning of earlier turns, so the model never writes them in that form.
    `conversations_by_question` makes each question the last one of an example.

    Args:
        tokenizer: The tokenizer, with its chat template.
        messages: The turns.
        tools: Function schemas in OpenAI's form.
        enable_thinking: Whether the model may think.

    Returns:
        Token ids (int32 [T]) and mask (bool [T]).

    Raises:
        DataError: A weight is neither 0 nor 1, a turn in the mask spells out control tokens or tool calls, or the
            assistant's turns cannot be located in the tokens.
    """
    turns = [_plain_turn(message, enable_thinking) for message in messages]
    token_ids = encode_chat(tokenizer, turns, tools=tools, add_generation_prompt=False, enable_thinking=enable_thinking)
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    counts = [counted for turn in turns for counted in [_counts(turn)] if turn["role"] == "assistant"]
    _refuse_markup(tokenizer, [turn for turn, counted in zip(answers, counts, strict=True) if counted])
    spans = _assistant_spans(tokenizer, token_ids, enable_thinking)
    if len(spans) != len(answers):
        raise DataError(
            f"The conversation has {len(answers)} assistant turns, but {len(spans)} are found in its tokens: the "
            "chat template must begin each of them with the generation prompt, and end it with a stop token."
        )
    mask = np.zeros(len(token_ids), dtype=bool)
    num_counted = len(_answers_to_last_question(turns)) if enable_thinking else len(spans)
    first = len(spans) - num_counted
    for (start, end), counted in zip(spans[first:], counts[first:], strict=True):
        mask[start:end] = counted
    return np.array(token_ids, dtype=np.int32), mask


def has_reasoning(messages: Iterable[AnyMessage]) -> bool:
    """Return whether an assistant turn with weight 1 has reasoning that is not blank."""
    turns = (_plain_turn(message, enable_thinking=True) for message in messages)
    return any("reasoning_content" in turn for turn in turns if _counts(turn))


def conversations_by_question(messages: Sequence[AnyMessage]) -> list[list[AnyMessage]]:
    """Return, for each answered question, the conversation up to its last answer; the whole one without questions."""
    roles = [message_dict(message)["role"] for message in messages]
    questions = [index for index, role in enumerate(roles) if role == "user"] or [0]
    ends = [*questions[1:], len(roles)]
    return [list(messages[:end]) for start, end in zip(questions, ends, strict=True) if "assistant" in roles[start:end]]


def _answers_to_last_question(turns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    roles = [turn["role"] for turn in turns]
    start = len(roles) - roles[::-1].index("user") if "user" in roles else 0
    return [turn for turn in turns[start:] if turn["role"] == "assistant"]


def _plain_turn(message: AnyMessage, enable_thinking: bool) -> dict[str, Any]:
    """Return a turn in OpenAI's form. Reasoning is in a separate field, or dropped without `enable_thinking`."""
    turn = message_dict(message)
    if turn["role"] != "assistant":
        return turn
    content = turn["content"]
    if content.startswith(THINK_START) and THINK_END in content:
        reasoning, _, turn["content"] = content.removeprefix(THINK_START).partition(THINK_END)
        turn.setdefault("reasoning_content", reasoning)
        if not enable_thinking or not reasoning.strip():
            turn["content"] = turn["content"].lstrip("\n")  # the separator of reasoning and answer
    if not enable_thinking or not turn.get("reasoning_content", "").strip():
        turn.pop("reasoning_content", None)
    return turn


def _counts(turn: Mapping[str, Any]) -> bool:
    """Return whether a turn is trained on: an assistant turn without weight 0. Raises DataError for other weights."""
    weight = turn.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"The weight of a turn is {weight!r}; it must be 0 (not trained on) or 1.")
    if turn["role"] != "assistant" and weight:
        raise DataError(f"A turn of role {turn['role']!r} has weight 1, but only assistant turns can be trained on.")
    return turn["role"] == "assistant" and weight != 0


def _assistant_spans(tokenizer: Tokenizer, token_ids: Sequence[int], enable_thinking: bool) -> list[tuple[int, int]]:
    """Return the range of each assistant turn, from the end of its generation prompt to the end of its stop token."""
    head = _turn_head(tokenizer, enable_thinking)
    spans, position = [], 0
    while position + len(head) <= len(token_ids):
        if tuple(token_ids[position : position + len(head)]) != head:
            position += 1
            continue
        start = position + len(head)
        stops = (index for index in range(start, len(token_ids)) if token_ids[index] in tokenizer.eos_token_ids)
        end = next(stops, None)
        if end is None:
            break
        spans.append((start, end + 1))
        position = end + 1
    return spans


@functools.lru_cache(maxsize=16)
def _turn_head(tokenizer: Tokenizer, enable_thinking: bool) -> tuple[int, ...]:
    """Return the tokens of the generation prompt."""
    question = [{"role": "user", "content": "x"}]
    with_prompt = encode_chat(tokenizer, question, enable_thinking=enable_thinking)
    without_prompt = encode_chat(tokenizer, question, enable_thinking=enable_thinking, add_generation_prompt=False)
    if with_prompt[: len(without_prompt)] != without_prompt or len(with_prompt) == len(without_prompt):
        raise DataError("The chat template has no generation prompt, so answers cannot be distinguished from prompts.")
    return tuple(with_prompt[len(without_prompt) :])


def _refuse_markup(tokenizer: Tokenizer, answers: Iterable[Mapping[str, Any]]) -> None:
    """Reject control tokens and tool calls in the text of a turn.

    They would be encoded as plain text, and the model would learn to spell them in ordinary tokens.
    """
    controls = [tokenizer.decode([token_id], skip_special=False) for token_id in tokenizer.control_token_ids]
    for turn in answers:
        calls = turn.get("tool_calls", [])
        text = f"{turn['content']}\n{turn.get('reasoning_content', '')}"
        for control in controls:
            if control in f"{text}\n{calls}":
                raise DataError(
                    f"An assistant turn spells out the control token {control}. Leave it out: the template ends turns."
                )
        if _CALL.search(text):
            raise DataError("An assistant turn spells out a tool call. Give it as 'tool_calls' of the turn.")
        for call in calls:
            if isinstance(call["function"]["arguments"], str):
                raise DataError(
                    f"The arguments of tool call {call['function']['name']!r} are not a JSON object: "
                    f"{call['function']['arguments']!r}."
                )


_CALL = re.compile(r"<tool_call>\s*(<function=|\{)")
