"""The choice between two exchanges of context parallelism for a full layer, and the numbers that they move.

    keys    a rank fetches the keys and values that its queries see, of all key/value heads
    heads   an all-to-all gives each rank all tokens of some heads, and a second one returns the outputs (Ulysses,
            arXiv 2309.14509)

Sliding layers fetch a halo of keys, and layers that share keys or block scores with another fetch keys.

N query heads, G key/value heads, C ranks.
"""

from collections.abc import Iterable

from openmimo.core.errors import ConfigError
from openmimo.model.attention import AttentionPlace
from openmimo.model.config import ModelConfig, local_heads

EXCHANGES = ("auto", "keys", "heads")


def head_shares(num_heads: int, num_kv_heads: int, num_ranks: int) -> tuple[int, int] | None:
    """Return the query heads and key/value heads of one rank, or None if the ranks cannot divide them.

    Several ranks have the same key/value head if there are fewer of these than ranks.
    """
    if num_heads % num_ranks or (num_kv_heads % num_ranks and num_ranks % num_kv_heads):
        return None
    return num_heads // num_ranks, max(num_kv_heads // num_ranks, 1)


def moved_heads(shares: tuple[int, int], num_tokens: int, num_ranks: int) -> float:
    """Return the heads of tokens that a rank receives in both all-to-alls, mean over ranks.

    One such head is a query and an output, or a key and a value; both are K + V numbers.
    """
    return num_tokens * (num_ranks - 1) / num_ranks * sum(shares)


def exchanges_heads(
    exchange: str, num_heads: int, num_kv_heads: int, *, num_ranks: int, num_tokens: int, fetched_rows: float
) -> bool:
    """Return whether a layer that may exchange heads does so.

    Args:
        exchange: One of `EXCHANGES`. With `auto`, that which moves fewer numbers.
        num_heads: Query heads of the layer on these ranks.
        num_kv_heads: Key/value heads.
        num_ranks: Ranks that share the tokens.
        num_tokens: Tokens of the micro-batch.
        fetched_rows: Rows of keys that a rank fetches otherwise, mean over ranks.
    """
    shares = head_shares(num_heads, num_kv_heads, num_ranks)
    if shares is None or exchange == "keys":
        return False
    return exchange == "heads" or moved_heads(shares, num_tokens, num_ranks) < fetched_rows * num_kv_heads


def gathered_heads(place: AttentionPlace, exchange: str, num_ranks: int) -> int:
    """Return the heads of all tokens of a long document that a rank holds in a full layer.

    One such head is K + V numbers, as in `moved_heads`.
    """
    heads, kv_heads = place.spec.num_heads, place.spec.num_kv_heads
    shares = head_shares(heads, kv_heads, num_ranks)
    if shares is None or why_only_keys(place, cp=num_ranks, tp=1) is not None:
        return kv_heads
    # one token a chunk has the ratio of the bytes of any length
    by_heads = exchanges_heads(
        exchange,
        heads,
        kv_heads,
        num_ranks=num_ranks,
        num_tokens=2 * num_ranks,
        fetched_rows=1.5 * (num_ranks - 1),
    )
    return sum(shares) if by_heads else kv_heads


def why_only_keys(place: AttentionPlace, *, cp: int, tp: int) -> str | None:
    """Return the reason why a full layer cannot exchange heads, as a predicate, or None."""
    spec = place.spec
    if place.is_source or spec.kv_from is not None or spec.score_block is not None:
        return "shares its keys or block scores with another layer"
    local = local_heads(spec, tp)
    if head_shares(local.num_heads, local.num_kv_heads, cp) is None:
        return f"has {local.num_heads} heads and {local.num_kv_heads} key/value heads, which {cp} ranks cannot divide"
    return None


def check_exchange(config: ModelConfig, exchange: str, *, cp: int, tp: int) -> None:
    """Raise ConfigError if `heads` is asked for and a full layer of the model cannot exchange them."""
    if exchange != "heads" or cp == 1:
        return
    for index, spec in enumerate(config.attention_layers()):
        reason = None if spec.window_keys is not None else why_only_keys(config.attention_place(index), cp=cp, tp=tp)
        if reason is not None:
            raise ConfigError(
                f"parallel.cp_exchange is heads, but attention layer {index} {reason}; set parallel.cp_exchange auto."
            )


def union_length(ranges: Iterable[tuple[int, int]]) -> int:
    """Return the number of integers in a union of ranges."""
    total = reached = 0
    for start, stop in sorted(ranges):
        total += max(stop - max(start, reached), 0)
        reached = max(reached, stop)
    return total
