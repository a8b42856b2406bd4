"""The store of new keys and values into the pages of a cache.

T tokens, G key/value heads, K key dim, V value dim, X pages, P positions a page.
"""

from typing import NamedTuple

import torch

from openmimo.kernels.dispatch import Dispatcher
from openmimo.kernels.paged_attention import Pages

DISPATCHER = Dispatcher("openmimo.kernels.paged_attention.store", "OPENMIMO_STORE")


class StoreNeed(NamedTuple):
    """Everything about one call that a backend may look at.

    Attributes:
        num_tokens: T.
        dtype: Of the new rows.
        cache_dtype: Of the pages.
        needs_gradients: Whether the new rows require gradients.
        readable: Whether rows and pages hold the numbers of a position contiguously.
        on_cpu: Whether the rows lie in the memory of the CPU.
    """

    num_tokens: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    needs_gradients: bool
    readable: bool
    on_cpu: bool


def store(pages: Pages, page_T: torch.Tensor, slot_T: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> None:
    """Row t goes to page `page_T[t]`, position `slot_T[t]` (int64) of both caches, in the dtype that they store.

    What a narrower dtype cannot hold becomes its largest number. Keys and values have one dtype; so have both caches.
    """
    keys, values = pages.keys_XPGK, pages.values_XPGV
    need = StoreNeed(
        k_TGK.shape[0],
        k_TGK.dtype,
        keys.dtype,
        k_TGK.requires_grad or v_TGV.requires_grad,
        k_TGK.stride()[1:] == keys.stride()[2:] == (k_TGK.shape[2], 1)
        and v_TGV.stride()[1:] == values.stride()[2:] == (v_TGV.shape[2], 1),
        k_TGK.is_cpu,
    )
    DISPATCHER.choose(need)[1].run(pages, page_T, slot_T, k_TGK, v_TGV)
