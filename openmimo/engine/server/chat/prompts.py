"""Tokenization of texts and conversations of requests, with bounded time and memory. Runs in a worker thread."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from openmimo.core.errors import DataError
from openmimo.data.chat.template import encode_chat
from openmimo.data.tokenizer import Tokenizer, text_pieces
from openmimo.engine.server.http import limits
from openmimo.engine.server.http.errors import ApiError, invalid


@dataclass(frozen=True)
class ChatOptions:
    """Options of the chat template.

    Attributes:
        thinks: Whether the model may open a `<think>` block.
        keep_all_reasoning: Whether the prompt contains the reasoning of turns before the last question.
    """

    thinks: bool = False
    keep_all_reasoning: bool = False


# The end of a prompt: the beginning of an assistant turn, the end of the last message, or the last message without its
# end, so that the reply continues it.
PromptEnding = Literal["new turn", "last message", "open turn"]


def prompt_ending(*, add_generation_prompt: bool | None, continue_final_message: bool | None) -> PromptEnding:
    """The ending that the two fields of a request select. Raises ApiError if they contradict each other."""
    if not continue_final_message:
        return "last message" if add_generation_prompt is False else "new turn"
    if add_generation_prompt:
        raise invalid(
            "continue_final_message and add_generation_prompt exclude each other; set one of them.",
            "continue_final_message",
        )
    return "open turn"


def encode_text(
    tokenizer: Tokenizer, text: str, *, most_tokens: int, param: str, allow_special: bool = False
) -> list[int]:
    """Encode a text. Raises ApiError if it has more than `most_tokens` tokens; encoding stops at that limit."""
    _check_passages([text], param, in_one_piece=allow_special)
    ids = tokenizer.encode(text, allow_special=allow_special, most_tokens=most_tokens)
    return _few_enough(ids, most_tokens, param)


def listed_prompts(prompt: Any) -> Sequence[str | list[int]]:
    """The prompts of a field of type `schema.Prompt`, each a text or a list of token ids."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str | list[int]],
    *,
    most_tokens: int,
    param: str,
    allow_special: bool = False,
) -> list[list[int]]:
    """Encode the texts among `prompts` as `encode_text` does."""
    return [
        encode_text(tokenizer, prompt, most_tokens=most_tokens, param=param, allow_special=allow_special)
        if isinstance(prompt, str)
        else prompt
        for prompt in prompts
    ]


def encode_messages(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    options: ChatOptions,
    *,
    most_tokens: int,
    ending: PromptEnding = "new turn",
    param: str = "messages",
) -> list[int]:
    """Render and encode a conversation.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation, in the form that templates take.
        tools: Tools in OpenAI's chat format.
        options: Options of the chat template.
        most_tokens: Maximum length in tokens.
        ending: End of the prompt.
        param: Field of the HTTP request that contains the conversation.

    Raises:
        ApiError: The template rejects the conversation, or it has more than `most_tokens` tokens.
    """
    _check_passages(_texts(messages), param)
    _check_passages(_texts(tools), "tools")
    try:
        ids = encode_chat(
            tokenizer,
            messages,
            tools=tools,
            add_generation_prompt=ending == "new turn",
            continue_final_message=ending == "open turn",
            enable_thinking=options.thinks,
            keep_all_reasoning=options.keep_all_reasoning,
            most_tokens=most_tokens,
        )
    except DataError as error:
        raise invalid(str(error), param) from error
    return _few_enough(ids, most_tokens, param)


def too_long(num_tokens: str, most_tokens: int, param: str) -> ApiError:
    """The error for a prompt that does not fit. `num_tokens` is a text, such as "more than 4096"."""
    return invalid(
        f"The prompt has {num_tokens} tokens, but at most {most_tokens} fit.",
        param,
        code="context_length_exceeded",
    )


def _few_enough(ids: list[int], most_tokens: int, param: str) -> list[int]:
    if len(ids) > most_tokens:
        raise too_long(f"more than {most_tokens}", most_tokens, param)
    return ids


def _check_passages(texts: Iterable[str], param: str, *, in_one_piece: bool = False) -> None:
    """Raise ApiError for a text whose tokenization would take hundreds of megabytes."""
    most = limits.PASSAGE_CHARACTERS
    for text in texts:
        if len(text) > most and (in_one_piece or any(len(piece) > most for piece in text_pieces(text))):
            raise invalid(
                f"The text contains a passage of more than {most} characters without a space between words or a line "
                "end; split the passage.",
                param,
            )


def _texts(value: Any) -> Iterable[str]:
    """Yield every string in parsed JSON, except keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
