"""Decoding and verification on a CPU: pages are read in place, and the whole batch is one call (native/attention.c).

A row of the output does not depend on what else the call computes, to the bit.
"""

import functools
import struct

import torch

from openmimo.kernels import native
from openmimo.kernels.attention import NO_SCORES, AttentionOut
from openmimo.kernels.dispatch import Backend
from openmimo.kernels.paged_attention import PagedNeed, Pages

MAX_QUERIES = 16
MAX_DIM = 256
NO_WINDOW = 1 << 62
KEY_MULTIPLE, VALUE_MULTIPLE = 16, 32
_CALL = struct.Struct("6P14q")  # `paged_call` of native/attention.c


def run(
    q_TNK: torch.Tensor,
    pages: Pages,
    sink_N: torch.Tensor | None,
    *,
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    window_keys: int | None,
    score_block: int | None = None,
) -> AttentionOut:
    """See `openmimo.kernels.paged_attention.paged_attend`."""
    keys_XPGK, values_XPGV, tables_BY = pages
    T, N, K = q_TNK.shape
    _, P, G, V = values_XPGV.shape
    key_strides, value_strides = _strides(keys_XPGK), _strides(values_XPGV)
    q_TNK, tables_BY = q_TNK.contiguous(), tables_BY.contiguous()
    out_TNV = q_TNK.new_empty(T, N, V)
    if sink_N is not None:
        sink_N = sink_N.to(torch.float32).contiguous()
    num_sequences = len(query_lengths)
    lengths = struct.pack(f"{2 * num_sequences}q", *query_lengths, *key_lengths)
    call = _CALL.pack(
        q_TNK.data_ptr(),
        keys_XPGK.data_ptr(),
        values_XPGV.data_ptr(),
        0 if sink_N is None else sink_N.data_ptr(),
        out_TNV.data_ptr(),
        tables_BY.data_ptr(),
        *(num_sequences, N, G, K, V),
        *(P, *key_strides, *value_strides, tables_BY.shape[1]),
        *(window_keys or NO_WINDOW, torch.get_num_threads(), q_TNK.dtype == torch.bfloat16),
    )
    _entry()(call, lengths)
    return AttentionOut(out_TNV)


def _strides(x_XPGK: torch.Tensor) -> tuple[int, int]:
    """The strides of pages and positions, in numbers. Raises ValueError if those of a position are not contiguous."""
    page, position, head, number = x_XPGK.stride()
    if number != 1 or head != x_XPGK.shape[3]:
        raise ValueError(f"the numbers of a cache position are not contiguous: strides {x_XPGK.stride()}")
    return page, position


@functools.cache
def _entry() -> native.Entry:
    return native.entry("openmimo_paged_attention", arguments=2)


def refuse(need: PagedNeed) -> str | None:
    """A few queries a sequence on a CPU, queries and cache of one dtype, whole vectors; no gradients, no scores."""
    if need.score_block is not None:
        return NO_SCORES
    if not need.on_cpu:
        return "it is for CPUs"
    if need.needs_gradients:
        return "it has no backward pass"
    if need.longest_query > MAX_QUERIES:
        return f"it is for at most {MAX_QUERIES} queries a sequence, not {need.longest_query}"
    if need.dtype != need.cache_dtype or need.dtype not in (torch.float32, torch.bfloat16):
        return f"queries and cache are both float32 or both bfloat16, not {need.dtype} and {need.cache_dtype}"
    if need.key_dim % KEY_MULTIPLE or need.value_dim % VALUE_MULTIPLE or max(need.key_dim, need.value_dim) > MAX_DIM:
        return (
            f"the key dim is a multiple of {KEY_MULTIPLE} and the value dim of {VALUE_MULTIPLE}, up to {MAX_DIM}, not "
            f"{need.key_dim} and {need.value_dim}"
        )
    if native.library() is None:
        return "the native library is not there"
    return None


PLUGIN = Backend(rank=10, run=run, refuse=refuse)
