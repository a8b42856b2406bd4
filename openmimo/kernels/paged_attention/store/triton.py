"""One kernel that writes the keys and values of each token to its page."""

import torch

from openmimo.kernels.attention import Pages, StoreNeed
from openmimo.kernels.dispatch import Backend, triton_unavailable

_CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def run(pages: Pages, page_T: torch.Tensor, slot_T: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> None:
    """Implement `openmimo.kernels.attention.store`. A token whose page is -1 is not written."""
    from openmimo.kernels.paged_attention.store._triton import store_rows

    store_rows(pages, page_T, slot_T, k_TGK, v_TGV)


def refuse(need: StoreNeed) -> str | None:
    """Rows that can be read and written by address, without gradients."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.needs_gradients:
        return "it has no backward pass"
    if need.cache_dtype not in _CACHE_DTYPES:
        return f"it does not write {need.cache_dtype}"
    return None if need.readable else "rows or pages are not contiguous"


PLUGIN = Backend(priority=80, run=run, refuse=refuse)
