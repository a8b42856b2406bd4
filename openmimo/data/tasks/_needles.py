"""Retrieval in token ids, for models too small to read English: facts hidden in filler, with questions at the end.

    filler @ K 7 filler filler @ C x filler ... ? C x ? K 7
           `fact`              `fact`           `question, answer`

A fact is three tokens, `@ key value`. A question is `? key`, and the next token, the value, is its answer. Keys are
capital letters, values are digits and lower-case letters, filler is common words. Every byte-level vocabulary has these
symbols as single tokens, so the task serves training (source `needles`) and evaluation, at any length and depth.
"""

import string
from dataclasses import dataclass

import numpy as np

from openmimo.core.errors import DataError
from openmimo.data.tokenizer import Tokenizer

TOKENS_PER_FACT = 3
KEYS = string.ascii_uppercase
VALUES = string.digits + string.ascii_lowercase
FILLER = (
    "the of and to in a is that it was for on are with as at be this from or by one had not but what all were when we "
    "there can an your which their said if do will each about how up out them then she many some so these would other "
    "into has more her two like him see time could no make than first been its who now people my made over did down"
)


@dataclass(frozen=True)
class NeedleSymbols:
    """The token ids of the task.

    Attributes:
        fact_mark: Id of `@`.
        question_mark: Id of `?`.
        keys: Ids of the keys.
        values: Ids of the values.
        filler_words: Ids of the filler words, int32 [words, longest word], padded with -1.
    """

    fact_mark: int
    question_mark: int
    keys: tuple[int, ...]
    values: tuple[int, ...]
    filler_words: np.ndarray


def needle_symbols(tokenizer: Tokenizer, *, num_keys: int = len(KEYS), num_values: int = len(VALUES)) -> NeedleSymbols:
    """Return the symbols' ids under `tokenizer`. Fewer keys and values make the task easier to learn and to guess.

    Raises DataError if a number is out of range or a symbol is not a single token.
    """
    for name, number, limit in (("num_keys", num_keys, len(KEYS)), ("num_values", num_values, len(VALUES))):
        if not 1 <= number <= limit:
            raise DataError(f"{name} of the needle task is {number}; it must be between 1 and {limit}.")
    words = tokenizer.encode_batch([f" {word}" for word in FILLER.split()])
    longest = max(map(len, words))
    return NeedleSymbols(
        fact_mark=tokenizer.id_of("@"),
        question_mark=tokenizer.id_of("?"),
        keys=tuple(tokenizer.id_of(key) for key in KEYS[:num_keys]),
        values=tuple(tokenizer.id_of(value) for value in VALUES[:num_values]),
        filler_words=np.array([word + [-1] * (longest - len(word)) for word in words], dtype=np.int32),
    )


def make_needle(
    symbols: NeedleSymbols,
    *,
    length: int,
    num_pairs: int,
    num_queries: int,
    rng: np.random.Generator,
    depth: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Make one example.

    Args:
        symbols: Token ids of the task.
        length: Length of the example in tokens.
        num_pairs: Number of facts. They have different keys and random positions in the filler.
        num_queries: Number of questions at the end, about different facts in random order.
        rng: Source of randomness.
        depth: Relative position of the fact of the first question, from 0.0 (start) to 1.0 (right before the
            questions); None is random.

    Returns:
        token_ids (int32 [length]) and answer_positions (int64 [num_queries]). `token_ids[p]` for p in answer_positions
        is the value that the tokens before p determine.

    Raises:
        DataError: The facts and questions do not fit.
    """
    num_filler = length - TOKENS_PER_FACT * (num_pairs + num_queries)
    _check(symbols, length=length, num_pairs=num_pairs, num_queries=num_queries, num_filler=num_filler, depth=depth)
    keys = rng.permutation(np.array(symbols.keys))[:num_pairs]
    values = np.array(symbols.values)[rng.integers(len(symbols.values), size=num_pairs)]
    queried = rng.permutation(num_pairs)[:num_queries]
    offsets = rng.integers(0, num_filler + 1, num_pairs)  # number of filler tokens before each fact
    if depth is not None:
        offsets[queried[0]] = round(depth * num_filler)
    order = np.argsort(offsets, kind="stable")
    facts = offsets[order] + TOKENS_PER_FACT * np.arange(num_pairs)
    questions = length - TOKENS_PER_FACT * np.arange(num_queries, 0, -1)

    token_ids = np.full(length, -1, dtype=np.int32)
    _put(token_ids, facts, symbols.fact_mark, keys[order], values[order])
    _put(token_ids, questions, symbols.question_mark, keys[queried], values[queried])
    token_ids[token_ids < 0] = _filler(symbols.filler_words, num_filler, rng)
    return token_ids, questions + TOKENS_PER_FACT - 1


def _put(token_ids: np.ndarray, starts: np.ndarray, mark: int, keys: np.ndarray, values: np.ndarray) -> None:
    """Write `mark key value` at each of `starts`."""
    token_ids[starts] = mark
    token_ids[starts + 1] = keys
    token_ids[starts + 2] = values


def _check(
    symbols: NeedleSymbols, *, length: int, num_pairs: int, num_queries: int, num_filler: int, depth: float | None
) -> None:
    if not 1 <= num_queries <= num_pairs <= len(symbols.keys):
        raise DataError(
            f"A needle example cannot have {num_pairs} facts and {num_queries} questions: it needs at least one "
            f"question, at most as many questions as facts, and at most as many facts as the {len(symbols.keys)} keys."
        )
    if num_filler < 0:
        raise DataError(
            f"{num_pairs} facts and {num_queries} questions take {length - num_filler} tokens, which do not fit into "
            f"{length}. Reduce their number, or increase the length."
        )
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise DataError(f"The depth of a needle is {depth}; it must be between 0.0 and 1.0.")


def _filler(words: np.ndarray, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `num_tokens` ids of random words with Zipf frequencies. The last word may be truncated."""
    cumulative = np.cumsum(1.0 / np.arange(1, len(words) + 1))
    drawn = words[np.searchsorted(cumulative, rng.random(num_tokens) * cumulative[-1], side="right")]
    return drawn[drawn >= 0][:num_tokens]
