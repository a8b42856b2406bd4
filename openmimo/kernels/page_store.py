"""Writing new keys and values into the pages of a cache: one native call for a few tokens on a CPU, else torch's.

T tokens, G key/value heads, K key dim, V value dim, X pages, P positions a page.
"""

import functools
import struct

import torch

from openmimo.kernels import native
from openmimo.kernels.paged_attention import Pages

MAX_TOKENS = 64  # more are worth torch's threads
_CALL = struct.Struct("6P9q")  # `store_call` of native/attention.c


def store(pages: Pages, page_T: torch.Tensor, slot_T: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> None:
    """Row t goes to page `page_T[t]`, position `slot_T[t]` (int64) of both caches, in the dtype that they store.

    What a narrower dtype cannot hold becomes its largest number.
    """
    keys, values = pages.keys_XPGK, pages.values_XPGV
    if not _is_readable(keys, k_TGK) or not _is_readable(values, v_TGV):
        keys[page_T, slot_T] = _saturated(k_TGK, keys.dtype)
        values[page_T, slot_T] = _saturated(v_TGV, values.dtype)
        return
    size = keys.element_size()
    T, G, K = k_TGK.shape
    V = v_TGV.shape[2]
    call = _CALL.pack(
        k_TGK.data_ptr(),
        v_TGV.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        page_T.data_ptr(),
        slot_T.data_ptr(),
        *(T, G * K * size, G * V * size, k_TGK.stride(0) * size, v_TGV.stride(0) * size),
        *(keys.stride(0) * size, keys.stride(1) * size, values.stride(0) * size, values.stride(1) * size),
    )
    _entry()(call)


def _saturated(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    if largest < torch.finfo(rows.dtype).max:
        wide = torch.promote_types(rows.dtype, torch.float32)  # bfloat16 would round the limit itself up
        rows = rows.to(wide).clamp(-largest, largest)
    return rows.to(dtype)


def _is_readable(cache_XPGK: torch.Tensor, rows_TGK: torch.Tensor) -> bool:
    """Whether rows and places of a cache are whole runs of numbers of one dtype, in memory that a CPU reads."""
    T, _, K = rows_TGK.shape
    return (
        rows_TGK.is_cpu
        and T <= MAX_TOKENS
        and rows_TGK.dtype == cache_XPGK.dtype
        and rows_TGK.stride()[1:] == cache_XPGK.stride()[2:] == (K, 1)
        and not rows_TGK.requires_grad
        and native.library() is not None
    )


@functools.cache
def _entry() -> native.Entry:
    return native.entry("openmimo_store_rows")
