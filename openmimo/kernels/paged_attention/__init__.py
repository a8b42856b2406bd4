"""Attention of the newest positions of sequences to all their positions, whose keys and values are in a paged cache.

The conventions are those of `openmimo.kernels.attention`: scale 1/sqrt(K), an unscaled sink logit in the denominator, a
window that counts the query's own key. Keys and values are not packed: a table maps each run of positions to a page,
and sequences with a common prefix may share pages.

T queries, N query heads, G key/value heads, K key dim, V value dim; B sequences, X pages, P positions a page, Y pages
of the longest sequence.
"""

from typing import NamedTuple

import torch

from openmimo.kernels.attention import AttentionOut
from openmimo.kernels.dispatch import Dispatcher

DISPATCHER = Dispatcher("openmimo.kernels.paged_attention", "OPENMIMO_PAGED_ATTENTION")


class Pages(NamedTuple):
    """The keys and values of one layer in the cache.

    The dtype of the cache may be narrower than that of the queries. The values of one position are contiguous; the
    strides of pages and positions are free.

    Attributes:
        keys_XPGK: View of the cached keys.
        values_XPGV: View of the cached values.
        tables_BY: int32, the page of positions y*P to y*P + P - 1 of sequence b. Entries of pages wholly before the
            window are never read and may have any value.
    """

    keys_XPGK: torch.Tensor
    values_XPGV: torch.Tensor
    tables_BY: torch.Tensor


class PagedNeed(NamedTuple):
    """The properties of one call; a backend decides from these alone whether it serves the call.

    Attributes:
        longest_query: The largest number of queries of a sequence.
        key_dim: K.
        value_dim: V.
        needs_gradients: Whether autograd records and an input requires a gradient.
        dtype: Dtype of the queries.
        cache_dtype: Dtype of the keys and values.
        on_cpu: Whether the queries are in CPU memory.
        score_block: Keys of a block of the requested block scores (None: no scores).
    """

    longest_query: int
    key_dim: int
    value_dim: int
    needs_gradients: bool
    dtype: torch.dtype
    cache_dtype: torch.dtype
    on_cpu: bool
    score_block: int | None = None


def paged_attend(
    q_TNK: torch.Tensor,
    pages: Pages,
    sink_N: torch.Tensor | None,
    *,
    query_lengths_B: torch.Tensor,
    key_lengths_B: torch.Tensor,
    longest_query: int,
    longest_key: int,
    window_keys: int | None,
    score_block: int | None = None,
) -> AttentionOut:
    """Attention output [T, N, V] in the dtype of `q_TNK`, and block scores if `score_block` is given.

    Args:
        q_TNK: Queries, packed. Their own keys and values are already in the pages.
        pages: Keys and values.
        sink_N: Sink logit of each query head, or None.
        query_lengths_B: int32 on the device, queries of each sequence; they are its last positions.
        key_lengths_B: int32 on the device, all positions of each sequence.
        longest_query: The largest query length. As a Python integer, it spares a device read before the launch.
        longest_key: The largest key length, likewise.
        window_keys: Keys that a query sees, its own included (None: all).
        score_block: Keys of a block, to request block scores. Not with a window: the first keys may be evicted.

    Raises:
        ValueError: Lengths and shapes disagree, or block scores are requested with a window.
    """
    T, N, K = q_TNK.shape
    _, P, G, V = pages.values_XPGV.shape
    B, Y = pages.tables_BY.shape
    shapes_fit = pages.keys_XPGK.shape[1:] == (P, G, K) and N % G == 0 and B <= T <= B * longest_query
    is_int32 = query_lengths_B.dtype == key_lengths_B.dtype == torch.int32
    have_lengths = query_lengths_B.shape[0] == key_lengths_B.shape[0] == B  # `len` of a tensor takes 2 us
    if not (shapes_fit and is_int32 and have_lengths and longest_key <= Y * P):
        raise ValueError(
            f"paged attention shapes do not fit: q {tuple(q_TNK.shape)}, keys {tuple(pages.keys_XPGK.shape)}, values "
            f"{tuple(pages.values_XPGV.shape)}, tables {(B, Y)}, query lengths "
            f"{query_lengths_B.tolist()}, key lengths {key_lengths_B.tolist()} (int32, up to {longest_query} and "
            f"{longest_key})"
        )
    if score_block is not None and window_keys is not None:
        raise ValueError(f"block scores need every key, but the window has {window_keys}")
    tensors = (q_TNK, pages.keys_XPGK, pages.values_XPGV, sink_N)
    need = PagedNeed(
        longest_query=longest_query,
        key_dim=K,
        value_dim=V,
        needs_gradients=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors),
        dtype=q_TNK.dtype,
        cache_dtype=pages.keys_XPGK.dtype,
        on_cpu=q_TNK.device.type == "cpu",
        score_block=score_block,
    )
    _, backend = DISPATCHER.choose(need)
    return backend.run(
        q_TNK,
        pages,
        sink_N,
        query_lengths_B=query_lengths_B,
        key_lengths_B=key_lengths_B,
        window_keys=window_keys,
        score_block=score_block,
    )
