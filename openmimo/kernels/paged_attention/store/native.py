"""Few tokens on a CPU: one call that copies whole rows (native/attention.c)."""

import torch

from openmimo.kernels import native
from openmimo.kernels.attention import Pages, StoreNeed
from openmimo.kernels.dispatch import Backend

MAX_TOKENS = 64  # above this, torch's threads are faster
_STORE_ROWS = native.Function("openmimo_store_rows", "6P9q")  # `store_call` of native/attention.c


def run(pages: Pages, page_T: torch.Tensor, slot_T: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> None:
    """Implement `openmimo.kernels.attention.store`."""
    keys, values = pages.keys_XPGK, pages.values_XPGV
    size = keys.element_size()
    T, G, K = k_TGK.shape
    V = v_TGV.shape[2]
    call = _STORE_ROWS.pack(
        k_TGK.data_ptr(),
        v_TGV.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        page_T.data_ptr(),
        slot_T.data_ptr(),
        *(T, G * K * size, G * V * size, k_TGK.stride(0) * size, v_TGV.stride(0) * size),
        *(keys.stride(0) * size, keys.stride(1) * size, values.stride(0) * size, values.stride(1) * size),
    )
    _STORE_ROWS.call(call)


def refuse(need: StoreNeed) -> str | None:
    """Refuse all but a few rows on a CPU, in the dtype of the pages, without gradients."""
    if need.num_tokens > MAX_TOKENS:
        return f"torch is faster for more than {MAX_TOKENS} tokens"
    if need.dtype != need.cache_dtype:
        return f"it copies, but the rows are {need.dtype} and the pages {need.cache_dtype}"
    if not need.readable:
        return "the numbers of a position are not contiguous"
    return native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
