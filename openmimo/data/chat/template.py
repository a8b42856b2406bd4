"""Conversations as text and as token ids, with the chat template of the checkpoint or MiMo's (`mimo_chat.jinja`).

A conversation is untrusted text. `render` can mark the special tokens that the template itself writes. The same text in
a message, a tool or an argument remains plain text, even where the template joins it from parts.
"""

import functools
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2

from openmimo.core.errors import DataError
from openmimo.core.records import Message
from openmimo.data.chat.jinja import SURROGATE, compile_template, marked, mimo_template
from openmimo.data.chat.tool_arguments import read_arguments
from openmimo.data.tokenizer import Tokenizer

_MARK = re.compile(f"({SURROGATE.pattern})")


def encode_chat(
    tokenizer: Tokenizer,
    messages: Iterable[Message | Mapping[str, Any]],
    *,
    tools: Iterable[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    enable_thinking: bool = False,
    keep_all_reasoning: bool = False,
    most_tokens: int | None = None,
) -> list[int]:
    """Return the ids of a conversation in the chat format of the tokenizer's checkpoint.

    Special tokens, `<think>` and tool tags come from the template only. Their names in a message of any role, a tool or
    the arguments of a call are encoded as plain text, so the text of a conversation cannot open or close a turn.

    Args:
        tokenizer: The tokenizer, with its chat template.
        messages: The turns, as in `render`.
        tools: Function schemas that the model may call.
        add_generation_prompt: Whether to open the turn of the assistant.
        continue_final_message: Whether to end after the content of the last message, which must be the assistant's, so
            that the model continues it. Excludes `add_generation_prompt`.
        enable_thinking: Whether the model may open `<think>` itself.
        keep_all_reasoning: Whether to keep the reasoning of turns before the last question.
        most_tokens: Encoding may stop after more than this number of tokens, as in `Tokenizer.encode`.

    Raises:
        DataError: The template or the conversation does not render.
    """
    final_mark = ""
    if continue_final_message:
        messages, final_mark = _with_final_mark(messages)
        add_generation_prompt = False
    template, eos_token, special_ids = tokenizer.chat_template, tokenizer.eos_token, tokenizer.special_tokens
    marks = _marks_of(template, eos_token, tuple(special_ids))
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
    if final_mark:
        text, _, rest = text.partition(final_mark)
        if not rest:
            raise DataError(
                "The chat template does not write the content of the last message, so it cannot be continued."
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


def _with_final_mark(messages: Iterable[Message | Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The conversation with a random text at the end of its last message, and that text. Raises DataError."""
    turns = [message_dict(message) for message in messages]
    if not turns or turns[-1]["role"] != "assistant" or "tool_calls" in turns[-1]:
        raise DataError("Only a text of the assistant can be continued; the last message must be one.")
    mark = secrets.token_hex(16)
    return [*turns[:-1], {**turns[-1], "content": turns[-1]["content"] + mark}], mark


def render(
    messages: Iterable[Message | Mapping[str, Any]],
    *,
    template: str | None = None,
    tools: Iterable[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
    enable_thinking: bool = False,
    keep_all_reasoning: bool = False,
    special_tokens: Mapping[str, str] | None = None,
    marks: Mapping[str, str] | None = None,
) -> str:
    """Render a conversation as text.

    Args:
        messages: `Message` records, or dicts in OpenAI's form.
        template: Jinja source; None is MiMo's.
        tools: Function schemas in OpenAI's form, with or without the outer `{"type": "function", "function": ...}`.
        add_generation_prompt: Whether to open the turn of the assistant.
        enable_thinking: Whether the model may open `<think>` itself.
        keep_all_reasoning: Whether to keep the reasoning of turns before the last question.
        special_tokens: Variables of the template, such as `eos_token`.
        marks: For each special token, a lone surrogate that replaces it where the template writes it. A conversation
            with lone surrogates is rejected, so that each of them in the result comes from the template.

    Raises:
        DataError: The template or the conversation does not render.
    """
    conversation = {
        "messages": [message_dict(message) for message in messages],
        "tools": [_tool_dict(tool) for tool in tools] or None,
    }
    variables = {
        **{name: marked(text, marks or {}) for name, text in (special_tokens or {}).items()},
        **conversation,
        "add_generation_prompt": add_generation_prompt,
        "enable_thinking": enable_thinking,
        "keep_all_reasoning": keep_all_reasoning,
    }
    try:
        if marks is not None:
            _check_no_surrogates(conversation)
        return compile_template(mimo_template() if template is None else template, tuple((marks or {}).items())).render(
            variables
        )
    except RecursionError as error:
        raise DataError("The chat template cannot render this conversation: it is nested too deeply.") from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise DataError(f"The chat template cannot render this conversation: {error}") from error


def message_dict(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    """Return one turn as templates expect it, with text content and arguments as dicts. Raises DataError."""
    if isinstance(message, Message):
        message = {
            "role": message.role,
            "content": message.content,
            "reasoning_content": message.reasoning_content,
            "tool_calls": message.tool_calls,
        }
    if not isinstance(message.get("role"), str):
        raise DataError(f"A message of the conversation has no 'role': {message!r}.")
    turn = {**message, "content": _content_text(message.get("content"))}
    for optional in ("reasoning_content", "tool_calls"):
        if not turn.get(optional):
            turn.pop(optional, None)
    if "tool_calls" in turn:
        turn["tool_calls"] = [_tool_call_dict(call) for call in turn["tool_calls"]]
    return turn


def _content_text(content: Any) -> str:
    """Return the text of a content: a text, None, or OpenAI's list of parts, all of them text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(map(_is_text_part, content)):
        return "".join(part["text"] for part in content)
    raise DataError("The content of a message must be text, or a list of {'type': 'text', 'text': ...} parts.")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _tool_call_dict(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"A tool call has no function name: {call!r}.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = read_arguments(arguments)
    elif arguments is None or isinstance(arguments, Mapping):
        arguments = dict(arguments or {})
    else:
        raise DataError(
            f"The arguments of tool call {function['name']!r} must be a JSON object or a text, not {arguments!r}."
        )
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tool_dict(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"A tool has no function name: {tool!r}.")
    return {"type": "function", "function": dict(function)}


def _check_no_surrogates(conversation: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(conversation, ensure_ascii=False, default=str)
    except (TypeError, ValueError) as error:
        raise DataError(f"A conversation and its tools must be JSON values ({error}).") from error
    if found := SURROGATE.search(text):
        raise DataError(
            f"The conversation contains the lone surrogate {found[0]!r}, half of a UTF-16 pair, which is not a "
            "character. Remove it."
        )


@functools.lru_cache(maxsize=16)
def _marks_of(template: str, eos_token: str, special_tokens: tuple[str, ...]) -> dict[str, str]:
    """Return the special tokens that the template can write, each with the lone surrogate that marks it in a rendering.

    Raises:
        DataError: The template joins special tokens from parts, which cannot be marked.
    """
    written = [token for token in special_tokens if token == eos_token or token in template]
    marks = {token: chr(0xD800 + number) for number, token in enumerate(written)}
    question = [{"role": "user", "content": "x"}]
    try:
        plain_text, marked_text = (
            render(question, template=template, special_tokens={"eos_token": eos_token}, marks=used_marks)
            for used_marks in (None, marks)
        )
    except DataError:  # the template rejects this question: check only the conversations that it accepts
        return marks
    longest_first = sorted(special_tokens, key=len, reverse=True)
    found = re.findall("|".join(map(re.escape, longest_first)), plain_text) if longest_first else []
    if [marks.get(token) for token in found] != _MARK.findall(marked_text):
        raise DataError(
            "The chat template joins special tokens from parts (such as '<|' + role + '|>'), so they cannot be "
            "distinguished from the text of a conversation. Write each of them as a whole in the template."
        )
    return marks
