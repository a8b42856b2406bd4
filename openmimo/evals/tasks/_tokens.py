"""Tasks on token ids, for models that are too small to read English: facts `@ x y` in filler, then `? x`.

A fact binds a key (a capital letter) to a value (a digit or small letter) or to another key. All symbols are single
tokens of every byte-level vocabulary, see `openmimo.data.tasks._needles`.
"""

import numpy as np

from openmimo.core.errors import DataError
from openmimo.data.tasks._needles import TOKENS_PER_FACT, NeedleSymbols, needle_symbols
from openmimo.evals.task import Example, Room


def token_example(room: Room, prompt_ids: np.ndarray | list[int], answer_ids: list[int], depth: float) -> Example:
    """An example whose answer has exactly the tokens of `answer_ids`."""
    return Example(
        token_ids=tuple(int(token) for token in prompt_ids),
        answer=room.tokenizer.decode(answer_ids),
        max_tokens=len(answer_ids),
        depth=depth,
    )


def exact(example: Example, text: str) -> float:
    """1 if the text is the answer, else 0."""
    return float(text == example.answer)


def chain_example(room: Room, rng: np.random.Generator, *, hops: int, num_chains: int, in_order: bool) -> Example:
    """Chains of facts `@ A 7`, `@ B A`, `@ C B`, ... and the query `? C`, whose answer is `7`.

    Args:
        room: Where the example must fit; filler words fill it.
        rng: Source of randomness.
        hops: Facts of a chain after the first, which binds a value.
        num_chains: Chains with different keys, one of which is asked for.
        in_order: Whether the facts of a chain come in its order.

    Raises:
        DataError: There are too few keys or tokens.
    """
    symbols = needle_symbols(room.tokenizer)
    per_chain = hops + 1
    num_facts = num_chains * per_chain
    num_filler = room.length - TOKENS_PER_FACT * (num_facts + 1)
    if num_facts > len(symbols.keys) or num_filler < 0:
        raise DataError(
            f"{num_chains} chains of {per_chain} facts need {num_facts} of {len(symbols.keys)} keys and "
            f"{TOKENS_PER_FACT * (num_facts + 1)} tokens; the length is {room.length}."
        )
    keys = rng.permutation(np.array(symbols.keys))[:num_facts].reshape(num_chains, per_chain)
    values = rng.permutation(np.array(symbols.values))[:num_chains]
    offsets = rng.random((num_chains, per_chain))
    if in_order:
        offsets.sort(axis=1)
    bound = np.concatenate([values[:, None], keys[:, :-1]], axis=1)
    order = np.argsort(offsets, axis=None, kind="stable")
    body = _with_filler(symbols, rng, keys.ravel()[order], bound.ravel()[order], offsets.ravel()[order], num_filler)
    asked = int(rng.integers(num_chains))
    prompt = [*body, symbols.question_mark, int(keys[asked, -1])]
    return token_example(room, prompt, [int(values[asked])], float(offsets[asked, 0]))


def _with_filler(
    symbols: NeedleSymbols,
    rng: np.random.Generator,
    keys: np.ndarray,
    bound: np.ndarray,
    depths: np.ndarray,
    num_filler: int,
) -> list[int]:
    """The facts in the given order, each at its depth of the filler."""
    words = symbols.filler_words
    drawn = words[rng.integers(len(words), size=num_filler)]
    filler = drawn[drawn >= 0][:num_filler].tolist()
    ids: list[int] = []
    done = 0
    for key, value, depth in zip(keys.tolist(), bound.tolist(), depths.tolist(), strict=True):
        position = round(depth * num_filler)
        ids += [*filler[done:position], symbols.fact_mark, key, value]
        done = position
    return ids + filler[done:]
