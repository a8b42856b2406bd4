"""Conversations of text and audio as parts, in the chat format of MiMo-Audio, for training and for replies.

A message is an object as in the rows of the public training toolkit:

    {"role": "user", "content": [{"type": "text", "text": "..."}, {"type": "audio", "audio": "clip.wav"}]}
    {"role": "assistant", "thinking": false, "content": [{"type": "text", "text": "..."}]}

`content` may also be a string. A turn of the assistant with audio is a spoken reply: its text and its audio are
interleaved. `thinking` true writes "Chain-of-thought" between think tags, false writes empty tags, null writes none.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from openmimo.core.errors import DataError
from openmimo.data.audio import corpus
from openmimo.data.tokenizer import THINK_END, THINK_START, TURN_END, TURN_START
from openmimo.model.audio.sequence import AudioPart, Part, SpeechPart, TextPart

VOICE, STYLE = corpus.VOICE, corpus.STYLE
STREAM_START = "<|sostm|>"
NO_THOUGHT = f"{THINK_START}\n\n{THINK_END}\n"
ROLES = ("system", "user", "assistant")

CodesOf = Callable[[Any], torch.Tensor]


def conversation_parts(messages: Sequence[Mapping[str, Any]], codes_of: CodesOf, *, where: str = "") -> list[Part]:
    """Return the parts of a conversation. Training predicts the turns of the assistant, after empty think tags.

    Args:
        messages: The turns.
        codes_of: Returns codes [frames, codebooks] of the value of `audio`.
        where: The source of the conversation, for messages.

    Raises:
        DataError: A message has another form; the message names its number.
    """
    parts: list[Part] = []
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{where or 'the conversation'} must be a list of messages, not empty.")
    for number, message in enumerate(messages):
        place = f"{where + ', ' if where else ''}message {number}"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise DataError(f"{place} needs a role of {', '.join(ROLES)}.")
        content = _items(message.get("content"), place)
        role = message["role"]
        parts.append(TextPart(f"{TURN_START}{role}\n", is_markup=True))
        if role == "assistant":
            parts += _assistant(message, content, codes_of, place)
        else:
            for item in content:
                parts.append(_part(item, codes_of))
            parts.append(TextPart(f"{TURN_END}\n", is_markup=True))
    return parts


def reply_parts(*, thinking: bool | None, is_spoken: bool) -> list[Part]:
    """Return the beginning of the assistant's turn, which the model continues.

    Args:
        thinking: As in a message. With True, the model writes its thoughts first and begins a spoken reply itself.
        is_spoken: Whether a spoken reply follows.
    """
    text = f"{TURN_START}assistant\n"
    if thinking:
        text += f"{THINK_START}\n"
    elif thinking is not None:
        text += NO_THOUGHT
    if is_spoken and not thinking:
        text += STREAM_START
    return [TextPart(text, is_markup=True)]


def _items(content: Any, place: str) -> list[Mapping[str, Any]]:
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, Sequence) or not items:
        raise DataError(f"{place} needs a content: a string, or a list of texts and audio.")
    for item in items:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind not in ("text", "audio") or kind not in item or (kind == "text" and not isinstance(item["text"], str)):
            raise DataError(
                f'{place} has a content that is neither {{"type": "text", "text": ...}} nor '
                '{"type": "audio", "audio": ...}.'
            )
    return list(items)


def _part(item: Mapping[str, Any], codes_of: CodesOf) -> Part:
    return TextPart(item["text"]) if item["type"] == "text" else AudioPart(codes_of(item["audio"]))


def _assistant(
    message: Mapping[str, Any], content: list[Mapping[str, Any]], codes_of: CodesOf, place: str
) -> list[Part]:
    """Return the turn of the assistant after its header."""
    parts: list[Part] = []
    thinking = message.get("thinking")
    if thinking not in (True, False, None):
        raise DataError(f"{place}: thinking is {thinking!r}; it must be true, false or null.")
    if thinking:
        thought = message.get("Chain-of-thought")
        if not isinstance(thought, str):
            raise DataError(f'{place}: thinking is true, but there is no text under "Chain-of-thought".')
        parts.append(TextPart(f"{THINK_START}\n", is_markup=True))
        parts.append(TextPart(thought, has_loss=True))
        parts.append(TextPart(f"{THINK_END}\n", is_markup=True, has_loss=True))
    elif thinking is not None:
        parts.append(TextPart(NO_THOUGHT, is_markup=True))
    text = "".join(item["text"] for item in content if item["type"] == "text")
    clips = [item["audio"] for item in content if item["type"] == "audio"]
    if len(clips) > 1:
        raise DataError(f"{place} is a spoken reply of {len(clips)} audio files; it may have one.")
    if clips:
        parts.append(SpeechPart(text, codes_of(clips[0]), has_loss=True))
    else:
        parts.append(TextPart(text, has_loss=True))
    return [*parts, TextPart(f"{TURN_END}\n", is_markup=True, has_loss=True)]
