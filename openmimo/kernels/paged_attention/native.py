"""Decoding and verification on a CPU: pages are read in place, and the whole batch is one call (native/attention.c).

Batch invariance: a row of the output has the same bits in every call that computes it.
"""

import torch

from openmimo.kernels import native
from openmimo.kernels.attention import AttentionOut, ChosenBlocks, PagedNeed, Pages
from openmimo.kernels.attention._calls import MAX_DECODE_QUERIES, NO_WINDOW, float32_sink, refuse_blocks
from openmimo.kernels.dispatch import Backend

MAX_DIM = 256
KEY_MULTIPLE, VALUE_MULTIPLE = 16, 32
_PAGED = native.Function("openmimo_paged_attention", "8P14q")  # `paged_call` of native/attention.c


def run(
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
    blocks: ChosenBlocks | None = None,
) -> AttentionOut:
    """Implement `openmimo.kernels.attention.paged_attend`."""
    keys_XPGK, values_XPGV, tables_BY = pages
    T, N, K = q_TNK.shape
    _, P, G, V = values_XPGV.shape
    key_strides, value_strides = _strides(keys_XPGK), _strides(values_XPGV)
    q_TNK = q_TNK.contiguous()
    assert tables_BY.stride(1) == 1 and query_lengths_B.is_contiguous() and key_lengths_B.is_contiguous()
    out_TNV = q_TNK.new_empty(T, N, V)
    sink_N = float32_sink(sink_N)
    call = _PAGED.pack(
        q_TNK.data_ptr(),
        keys_XPGK.data_ptr(),
        values_XPGV.data_ptr(),
        0 if sink_N is None else sink_N.data_ptr(),
        out_TNV.data_ptr(),
        tables_BY.data_ptr(),
        query_lengths_B.data_ptr(),
        key_lengths_B.data_ptr(),
        *(query_lengths_B.shape[0], N, G, K, V),
        *(P, *key_strides, *value_strides, tables_BY.stride(0)),
        *(window_keys or NO_WINDOW, torch.get_num_threads(), q_TNK.dtype == torch.bfloat16),
    )
    _PAGED.call(call)
    return AttentionOut(out_TNV)


def _strides(x_XPGK: torch.Tensor) -> tuple[int, int]:
    """Return the strides of pages and positions, in elements. Raises ValueError if a position is not contiguous."""
    page, position, head, element = x_XPGK.stride()
    if element != 1 or head != x_XPGK.shape[3]:
        raise ValueError(f"the values of a cache position are not contiguous: strides {x_XPGK.stride()}")
    return page, position


def refuse(need: PagedNeed) -> str | None:
    """Refuse all but few queries per sequence on a CPU, of the cache's dtype and whole vectors, without gradients."""
    if reason := refuse_blocks(need):
        return reason
    if need.longest_query > MAX_DECODE_QUERIES:
        return f"it takes at most {MAX_DECODE_QUERIES} queries a sequence, not {need.longest_query}"
    if need.dtype != need.cache_dtype:
        return f"the queries are {need.dtype} and the cache {need.cache_dtype}"
    if need.key_dim % KEY_MULTIPLE or need.value_dim % VALUE_MULTIPLE or max(need.key_dim, need.value_dim) > MAX_DIM:
        return (
            f"it takes key dims that are multiples of {KEY_MULTIPLE} and value dims that are multiples of "
            f"{VALUE_MULTIPLE}, up to {MAX_DIM}, not {need.key_dim} and {need.value_dim}"
        )
    return native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
