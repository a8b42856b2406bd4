"""Attention of the newest positions of some sequences to all their positions, which lie in the pages of a cache.

The conventions are those of `openmimo.kernels.attention`: scale 1/sqrt(K), an unscaled sink logit in the denominator, a
window that counts the query itself. Here keys and values are not packed: a table says in which page each run of
positions lies, and sequences that begin alike may share pages.

T queries, N query heads, G key/value heads, K key dim, V value dim; B sequences, X pages, P positions a page, Y pages
of the longest sequence.
"""

from typing import NamedTuple

import torch

from openmimo.kernels.attention import AttentionOut
from openmimo.kernels.dispatch import Dispatcher

DISPATCHER = Dispatcher("openmimo.kernels.paged_attention", "OPENMIMO_PAGED_ATTENTION")


class Pages(NamedTuple):
    """Where the keys and values of one layer lie.

    keys_XPGK, values_XPGV: views into the cache, of the dtype that it stores (which may be narrower than that of the
    queries); the numbers of one position are contiguous, the strides of pages and positions are free. tables_BY, int32:
    the page of positions y*P to y*P + P - 1 of sequence b; entries of pages that lie wholly before its window are
    never read and may be anything.
    """

    keys_XPGK: torch.Tensor
    values_XPGV: torch.Tensor
    tables_BY: torch.Tensor


class PagedNeed(NamedTuple):
    """What one call asks for: all that a backend may look at before it accepts."""

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
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    window_keys: int | None,
    score_block: int | None = None,
) -> AttentionOut:
    """Attention output [T, N, V] in the dtype of `q_TNK`, and block scores if `score_block` gives the size of a block.

    `key_lengths[b]` counts every position of sequence b; its queries are the last `query_lengths[b]` of these, whose
    keys and values are already in the pages. With a window there are no block scores, as the keys of the first blocks
    may be gone.

    Raises:
        ValueError: Lengths and shapes disagree, or block scores are asked for with a window.
    """
    T, N, K = q_TNK.shape
    _, P, G, V = pages.values_XPGV.shape
    B, Y = pages.tables_BY.shape
    shapes_fit = pages.keys_XPGK.shape[1:] == (P, G, K) and N % G == 0 and sum(query_lengths) == T
    if not shapes_fit or not len(query_lengths) == len(key_lengths) == B or max(key_lengths) > Y * P:
        raise ValueError(
            f"paged attention shapes do not fit: q {tuple(q_TNK.shape)}, keys {tuple(pages.keys_XPGK.shape)}, values "
            f"{tuple(pages.values_XPGV.shape)}, tables {(B, Y)}, query lengths {query_lengths}, "
            f"key lengths {key_lengths}"
        )
    if score_block is not None and window_keys is not None:
        raise ValueError(f"block scores need every key, but the window has {window_keys}")
    tensors = (q_TNK, pages.keys_XPGK, pages.values_XPGV, sink_N)
    need = PagedNeed(
        longest_query=max(query_lengths),
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
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        window_keys=window_keys,
        score_block=score_block,
    )
