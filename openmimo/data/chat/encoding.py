"""Token ids of conversations.

The chat template writes the special tokens. The text of a conversation cannot: it is encoded as plain text.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from openmimo.core.errors import DataError
from openmimo.core.records import Message
from openmimo.data.chat.jinja import SURROGATE
from openmimo.data.chat.template import render
from openmimo.data.tokenizer import Tokenizer

_MARK = re.compile(f"({SURROGATE.pattern})")


def encode_chat(
    tokenizer: Tokenizer,
    messages: Iterable[Message | Mapping[str, Any]],
    *,
    tools: Iterable[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
    enable_thinking: bool = False,
    keep_all_reasoning: bool = False,
    most_tokens: int | None = None,
) -> list[int]:
    """Returns the ids of a conversation in the chat format of the tokenizer's checkpoint.

    Special tokens, `<think>` and tool markup included, come from the template only. Their names in a message of any
    role, a tool or the arguments of a call are plain text, so no text of a conversation opens or closes a turn.

    Args:
        tokenizer: The tokenizer, with its chat template.
        messages: The turns; see `template.render`, as for the options below.
        tools: Function schemas that the model may call.
        add_generation_prompt: Whether to open the turn of the assistant.
        enable_thinking: Whether the model may open its own `<think>`.
        keep_all_reasoning: Whether to keep the reasoning of turns before the last question.
        most_tokens: If the conversation has more tokens, the rest may be left out; see `Tokenizer.encode`.

    Raises:
        DataError: The template or the conversation does not render.
    """
    template, eos_token, special_ids = tokenizer.chat_template, tokenizer.eos_token, tokenizer.special_tokens
    marks = _marks(template, eos_token, tuple(special_ids))
    text = render(
        messages,
        template=template,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=enable_thinking,
        keep_all_reasoning=keep_all_reasoning,
        special_tokens={"eos_token": eos_token},
        marks=marks,
    )
    id_of_mark = {mark: special_ids[token] for token, mark in marks.items()}
    ids: list[int] = []
    for piece in _MARK.split(text):
        if most_tokens is not None and len(ids) > most_tokens:
            break
        if piece in id_of_mark:
            ids.append(id_of_mark[piece])
        else:
            ids.extend(tokenizer.encode(piece, most_tokens=most_tokens))
    return ids


@functools.lru_cache(maxsize=16)
def _marks(template: str, eos_token: str, special_tokens: tuple[str, ...]) -> dict[str, str]:
    """The special tokens that the template can write, each with the lone surrogate that marks it in a rendering.

    Raises:
        DataError: The template joins special tokens from parts, which cannot be marked.
    """
    written = [token for token in special_tokens if token == eos_token or token in template]
    marks = {token: chr(0xD800 + number) for number, token in enumerate(written)}
    question = [{"role": "user", "content": "x"}]
    try:
        plain, marked = (
            render(question, template=template, special_tokens={"eos_token": eos_token}, marks=given)
            for given in (None, marks)
        )
    except DataError:  # a template that refuses this question is judged by the conversations that it accepts
        return marks
    longest_first = sorted(special_tokens, key=len, reverse=True)
    found = re.findall("|".join(map(re.escape, longest_first)), plain) if longest_first else []
    if [marks.get(token) for token in found] != _MARK.findall(marked):
        raise DataError(
            "The chat template puts special tokens together of parts (such as '<|' + role + '|>'), so they cannot be "
            "distinguished from the text of a conversation. Write each of them whole in the template."
        )
    return marks
