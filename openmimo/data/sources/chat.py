"""Conversations from JSON Lines or Parquet as training rows in the chat format.

Only tokens of the assistant enter the loss.

Each line is an object with `messages` in OpenAI's format and optionally `tools`. A conversation with reasoning
(`reasoning_content`, or `<think>` in the content) becomes one example per question, because the template hides the
reasoning of earlier turns. Any other conversation is one example.
"""

import hashlib
import json
import warnings
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from openmimo.core.errors import DataError
from openmimo.data.chat.conversation import conversations_by_question, encode_conversation, has_reasoning
from openmimo.data.chat.rows import Document, join_row, make_document
from openmimo.data.objects import read_objects
from openmimo.data.source import Row, RowMaker, RowMakers, Split, SyntheticSource, split_of
from openmimo.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """Options of source `chat`.

    Attributes:
        path: A file of JSON Lines (.jsonl, .jsonl.gz, .json.gz) or Parquet, or a folder of one of these kinds.
        thinking: "auto" uses thinking mode for conversations with reasoning only; "on" uses it for all; "off" uses it
            for none and drops reasoning.
    """

    path: str
    thinking: Literal["auto", "on", "off"] = "auto"


def row_makers(options: Options, tokenizer: Tokenizer, sequence_length: int, validation_fraction: float) -> RowMakers:
    """Return makers of rows of whole conversations, drawn at random. All conversations are kept in memory.

    A conversation is held out with all its examples; an example that also occurs in the training part is removed from
    it. Conversations longer than a row are skipped, with a warning that counts them.

    Raises:
        DataError: No conversation remains for training.
    """
    examples = read_examples(options, tokenizer, validation_fraction)
    held_out = {document.token_ids.tobytes() for document in examples["validation"]}
    examples["train"] = [document for document in examples["train"] if document.token_ids.tobytes() not in held_out]
    fitting = {
        split: [document for document in documents if len(document.token_ids) <= sequence_length]
        for split, documents in examples.items()
    }
    num_all, num_fitting = (sum(map(len, by_split.values())) for by_split in (examples, fitting))
    if not num_all:
        raise DataError(f"{options.path} contains no conversation with an answer of the assistant to learn.")
    if not fitting["train"]:
        raise DataError(
            f"Source 'chat' finds no conversation in {options.path} to train on that fits into rows of "
            f"{sequence_length} tokens ({num_all} have assistant turns; {num_fitting} of these fit, of which "
            f"{len(fitting['validation'])} are held out). Lengthen the rows, lower validation_fraction, or "
            "add conversations."
        )
    if num_fitting < num_all:
        warnings.warn(
            f"{options.path}: {num_all - num_fitting} of {num_all} conversations are longer than {sequence_length} "
            "tokens and are skipped.",
            stacklevel=2,
        )
    makers = {split: _row_maker(documents, sequence_length) for split, documents in fitting.items() if documents}
    return RowMakers(makers, _fingerprint(examples))


def _row_maker(documents: list[Document], sequence_length: int) -> RowMaker:
    bins = pack([len(document.token_ids) for document in documents], sequence_length)

    def make_row(rng: np.random.Generator) -> Row:
        chosen = rng.permutation(bins[rng.integers(len(bins))])
        row = [documents[number] for number in chosen]
        return join_row(row, sequence_length, filler=lambda: documents[rng.integers(len(documents))])

    return make_row


def _fingerprint(examples: Mapping[Split, list[Document]]) -> str:
    """Return the SHA-256 of all tokens and masks, by split."""
    digest = hashlib.sha256()
    for split, documents in examples.items():
        digest.update(f"{split} {len(documents)} ".encode())
        for document in documents:
            digest.update(document.token_ids.astype("<u4").tobytes())
            digest.update(document.mask.tobytes())
    return digest.hexdigest()


def read_examples(options: Options, tokenizer: Tokenizer, validation_fraction: float) -> dict[Split, list[Document]]:
    """Return the examples by split. Raises DataError with file and line for a conversation that cannot be rendered."""
    examples: dict[Split, list[Document]] = {"train": [], "validation": []}
    for where, line in read_objects(options.path):
        messages, tools = _messages(line, where), [] if line.get("tools") is None else line["tools"]
        if not isinstance(messages, list) or not isinstance(tools, list):
            raise DataError(f"{where}: 'messages' must be a list, and so must 'tools' if there are any.")
        documents = examples[split_of(json.dumps([messages, tools], sort_keys=True), validation_fraction)]
        try:
            encoded = _encode(messages, tools, options, tokenizer)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        documents.extend(make_document(pair, tokenizer.end_of_text_id) for pair in encoded if pair[1].any())
    return examples


def _messages(line: Mapping[str, Any], where: str) -> Any:
    if "messages" in line:
        return line["messages"]
    for form, keys, advice in _OTHER_FORMS:
        if keys <= line.keys():
            raise DataError(f"{where}: this is a line in the {form} format, which is not supported. {advice}")
    raise DataError(
        f"{where}: the key 'messages' is missing (found: {', '.join(line) or 'nothing'}). Give the conversation as a "
        'list of {"role": ..., "content": ...} under \'messages\'.'
    )


_OTHER_FORMS = (
    (
        "ShareGPT",
        {"conversations"},
        "Rename 'conversations' to 'messages', 'from' to 'role' (human: user, gpt: assistant), 'value' to 'content'.",
    ),
    (
        "Alpaca",
        {"instruction", "output"},
        "Write 'messages': a user turn of 'instruction' and 'input', and an assistant turn of 'output'.",
    ),
    (
        "preference",
        {"chosen", "rejected"},
        "Write 'messages': the turns of 'prompt' and of 'chosen'.",
    ),
    (
        "prompt and completion",
        {"prompt", "completion"},
        "Write 'messages': a user turn of 'prompt', and an assistant turn of 'completion'.",
    ),
    ("plain text", {"text"}, "Read texts with source 'jsonl', or write 'messages'."),
)


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
    """Pack items by best-fit decreasing: each item, longest first, goes into the fullest bin with room for it.

    No length may exceed `capacity`. Every item is in exactly one bin, so drawing bins uniformly draws items uniformly.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        index = bisect_left(rooms, (lengths[item], -1))
        if index == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(index)
        bins[number].append(item)
        insort(rooms, (room - lengths[item], number))
    return bins


PLUGIN = SyntheticSource(
    describe="conversations from JSON Lines in the chat format (options: path, thinking)",
    options=Options,
    row_makers=row_makers,
)
