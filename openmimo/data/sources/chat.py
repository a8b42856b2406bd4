"""Conversations from JSON Lines as training rows, in the chat format; only what the assistant wrote counts.

Each line is an object with `messages` in OpenAI's form and, if functions can be called, `tools`. A conversation whose
assistant reasons (`reasoning_content`, or `<think>` in the content) becomes one example for each question, as the
reasoning of earlier ones is hidden; any other is one example.
"""

import warnings
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from openmimo.core.errors import DataError
from openmimo.data.conversation import conversations_by_question, encode_conversation, has_reasoning
from openmimo.data.conversation_rows import Document, join_row, make_document
from openmimo.data.json_lines import read_objects
from openmimo.data.source import Row, RowMaker, SyntheticSource
from openmimo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """path: a file, or a folder of .jsonl files. thinking: "auto" teaches conversations with reasoning in the thinking
    mode and the others in the other one; "on" and "off" take one mode for all ("off" leaves reasoning out).
    """

    path: str
    thinking: Literal["auto", "on", "off"] = "auto"


def row_maker(options: Options, tokenizer: Tokenizer, sequence_length: int) -> RowMaker:
    """Rows of whole conversations, drawn at random; all of them are kept in memory.

    Conversations longer than a row are left out, with a warning that counts them. Raises DataError if none is left.
    """
    documents = list(read_documents(options, tokenizer))
    fitting = [document for document in documents if len(document.token_ids) <= sequence_length]
    if not fitting:
        raise DataError(
            f"Source 'chat' finds no conversation in {options.path} that fits into rows of {sequence_length} tokens "
            f"(there are {len(documents)} in which the assistant speaks). Lengthen the rows, or give it others."
        )
    if len(fitting) < len(documents):
        warnings.warn(
            f"{options.path}: {len(documents) - len(fitting)} of {len(documents)} conversations are longer than "
            f"{sequence_length} tokens and are left out.",
            stacklevel=2,
        )
    bins = pack([len(document.token_ids) for document in fitting], sequence_length)

    def make_row(rng: np.random.Generator) -> Row:
        chosen = rng.permutation(bins[rng.integers(len(bins))])
        row = [fitting[number] for number in chosen]
        return join_row(row, sequence_length, filler=lambda: fitting[rng.integers(len(fitting))])

    return make_row


def read_documents(options: Options, tokenizer: Tokenizer) -> Iterator[Document]:
    """The examples of the file as tokens. A conversation that cannot be rendered is a DataError with file and line."""
    for where, line in read_objects(options.path):
        messages, tools = line.get("messages"), [] if line.get("tools") is None else line["tools"]
        if not isinstance(messages, list) or not isinstance(tools, list):
            raise DataError(f"{where}: 'messages' must be a list, and so must 'tools' if there are any.")
        try:
            for token_ids, mask in _encode(messages, tools, options, tokenizer):
                if mask.any():
                    yield make_document((token_ids, mask), tokenizer.end_of_text_id)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


def _encode(
    messages: list[Any], tools: list[Any], options: Options, tokenizer: Tokenizer
) -> list[tuple[np.ndarray, np.ndarray]]:
    if not all(isinstance(item, dict) for item in [*messages, *tools]):
        raise DataError("Every message and every tool must be an object.")
    thinking = has_reasoning(messages) if options.thinking == "auto" else options.thinking == "on"
    conversations = conversations_by_question(messages) if thinking else [messages]
    return [
        encode_conversation(tokenizer, conversation, tools=tools, enable_thinking=thinking)
        for conversation in conversations
    ]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Divides numbered items among bins, each item into the fullest bin that has room for it, the longest item first.

    No length may be above `capacity`. As every item is in one bin, drawing bins at random draws all items equally.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        place = bisect_left(rooms, (lengths[item], -1))
        if place == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(place)
        bins[number].append(item)
        insort(rooms, (room - lengths[item], number))
    return bins


PLUGIN = SyntheticSource(
    describe="conversations from JSON Lines, in the chat format (options: path, thinking)",
    options=Options,
    row_maker=row_maker,
)
