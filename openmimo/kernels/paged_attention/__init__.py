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
    query_lengths_B: torch.Tensor,
    key_lengths_B: torch.Tensor,
    longest_query: int,
    longest_key: int,
    window_keys: int | None,
    score_block: int | None = None,
) -> AttentionOut:
    """Attention output [T, N, V] in the dtype of `q_TNK`, and block scores if `score_block` gives the size of a block.

    `key_lengths_B[b]` (int32, on the device) counts every position of sequence b; its queries are the last
    `query_lengths_B[b]` of these, whose keys and values are already in the pages. The integers are the largest entries
    of both, so that no device value is read to choose and launch a kernel. With a window there are no block scores, as
    the keys of the first blocks may be gone.

    Raises:
        ValueError: Lengths and shapes disagree, or block scores are asked for with a window.
    """
    T, N, K = q_TNK.shape
    _, P, G, V = pages.values_XPGV.shape
    B, Y = pages.tables_BY.shape
    shapes_fit = pages.keys_XPGK.shape[1:] == (P, G, K) and N % G == 0 and B <= T <= B * longest_query
    is_int32 = query_lengths_B.dtype == key_lengths_B.dtype == torch.int32
    if not (shapes_fit and is_int32 and len(query_lengths_B) == len(key_lengths_B) == B and longest_key <= Y * P):
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
