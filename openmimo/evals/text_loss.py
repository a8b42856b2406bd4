"""Loss on the user's own texts, by position: `openmimo eval MODEL --text FILE`.

Each document is cut into windows, which the model reads independently. The first token of a window has no context and
is not counted. Bits per byte are the bits of the counted tokens divided by their bytes, so that models with different
tokenizers can be compared.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from openmimo.core.errors import DataError
from openmimo.core.metrics import TimeLeft
from openmimo.data.source import read_documents
from openmimo.data.text_files import text_source
from openmimo.data.tokenizer import Tokenizer, cut_text
from openmimo.evals.config import EvalConfig

MAX_WINDOW = 2048
_FIRST_EDGE = 32
_FIRST_CONTEXT = 512


@dataclass(frozen=True)
class TextLoss:
    """The mean loss of the tokens at some positions of their windows.

    Attributes:
        first: First position, from 0.
        last: Last position.
        tokens: Number of counted tokens.
        nats_per_token: Mean cross-entropy.
        bits_per_byte: Bits of these tokens by the bytes of their text.
    """

    first: int
    last: int
    tokens: int
    nats_per_token: float
    bits_per_byte: float


def text_windows(config: EvalConfig, tokenizer: Tokenizer, max_positions: int) -> list[list[int]]:
    """The token ids of the windows, up to `config.text_tokens` in all.

    Raises:
        DataError: There is no text, or it has no window of two tokens.
    """
    assert config.text is not None
    length = config.window or min(MAX_WINDOW, max_positions)
    room = config.text_tokens or math.inf
    windows = []
    for ids in _documents(config.text, config.text_field, tokenizer, room):
        for start in range(0, len(ids), length):
            window = ids[start : start + min(length, int(min(room, length)))]
            room -= len(window)
            if len(window) >= 2:
                windows.append(window)
    if not windows:
        raise DataError(f"{config.text} has no document of two tokens or more. Give more text.")
    return windows


def _documents(path: str, field: str | None, tokenizer: Tokenizer, most_tokens: float) -> Iterator[list[int]]:
    """The token ids of the documents, until there are `most_tokens`."""
    for text in read_documents(text_source(path, field)):
        ids: list[int] = []
        for piece in cut_text(text):
            if most_tokens <= 0:
                break
            new = tokenizer.encode(piece)
            ids.extend(new)
            most_tokens -= len(new)
        if ids:
            yield ids
        if most_tokens <= 0:
            return


def measure(
    windows: Iterable[list[int]],
    score: Callable[[list[int]], torch.Tensor],
    tokenizer: Tokenizer,
    report: Callable[[str], None],
) -> list[TextLoss]:
    """The loss by position, in ranges that end at powers of two, and of all tokens (the last entry).

    Args:
        windows: Token ids.
        score: Log-probabilities of all tokens of a window but the first, as `LLM.score`.
        tokenizer: For the bytes of each token.
        report: Called once with the time left, if that is long.
    """
    windows = list(windows)
    edges = _edges(max(map(len, windows)))
    nats, sizes, counts = ([0.0] * len(edges) for _ in range(3))
    left = sum(map(len, windows))
    time_left = TimeLeft(2)
    for window in windows:
        started = time.perf_counter()
        losses = (-score(window)).tolist()
        for position, (loss, token) in enumerate(zip(losses, window[1:], strict=True), start=1):
            index = next(index for index, edge in enumerate(edges) if position < edge)
            nats[index] += loss
            sizes[index] += len(tokenizer.token_bytes(token))
            counts[index] += 1
        left -= len(window)
        if said := time_left.after_step(time.perf_counter() - started, len(window), left):
            report(said)
    ranges = zip([1, *edges[:-1]], edges, counts, nats, sizes, strict=True)
    parts = [_loss(first, end - 1, count, total, size) for first, end, count, total, size in ranges if count]
    return [*parts, _loss(1, edges[-1] - 1, sum(counts), sum(nats), sum(sizes))]


def measure_last(
    windows: Iterable[list[int]],
    last_tokens: int,
    score: Callable[[list[int]], torch.Tensor],
    tokenizer: Tokenizer,
    report: Callable[[str], None],
) -> list[TextLoss]:
    """The loss of the same last tokens of each window after contexts of several lengths.

    The difficulty of the text is the same for every context, so the losses show what a longer context adds.

    Args:
        windows: Token ids. Only windows of the largest length count.
        last_tokens: The measured tokens of a window.
        score: As in `measure`.
        tokenizer: For the bytes of each token.
        report: Called once with the time left, if that is long.

    Returns:
        One entry for each context. `first` is its number of tokens, which is the position of the first measured one.

    Raises:
        DataError: The windows are too short.
    """
    windows = list(windows)
    length = max(map(len, windows))
    contexts = _contexts(length - last_tokens)
    if not contexts:
        raise DataError(
            f"The windows have {length} tokens; {last_tokens} last tokens need more than {_FIRST_EDGE} before them. "
            "Give longer documents, a larger --window or fewer --last-tokens."
        )
    whole = [window for window in windows if len(window) == length]
    nats, size = dict.fromkeys(contexts, 0.0), 0
    left = len(whole) * sum(context + last_tokens for context in contexts)
    time_left = TimeLeft(2)
    for window in whole:
        size += sum(len(tokenizer.token_bytes(token)) for token in window[-last_tokens:])
        for context in contexts:
            started = time.perf_counter()
            nats[context] -= float(score(window[-last_tokens - context :])[-last_tokens:].sum())
            left -= context + last_tokens
            if said := time_left.after_step(time.perf_counter() - started, context + last_tokens, left):
                report(said)
    count = len(whole) * last_tokens
    return [_loss(context, context + last_tokens - 1, count, nats[context], size) for context in contexts]


def _contexts(most: int) -> list[int]:
    """512, 1024, ... up to `most`, which is the last; shorter ones if `most` is short."""
    context = _FIRST_CONTEXT if most >= 2 * _FIRST_CONTEXT else _FIRST_EDGE
    contexts = []
    while context < most:
        contexts.append(context)
        context *= 2
    return [*contexts, most] if contexts else []


def _edges(length: int) -> list[int]:
    """The ends of the position ranges of windows of up to `length` tokens."""
    edges = [_FIRST_EDGE]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [*edges[:-1], length] if length >= _FIRST_EDGE else [length]


def _loss(first: int, last: int, count: float, nats: float, size: float) -> TextLoss:
    return TextLoss(first, last, int(count), nats / count, nats / math.log(2) / size if size else math.nan)
