"""The definition: indexed assignment of saturated or quantized rows."""

import torch

from openmimo.kernels.attention import Pages, write_rows
from openmimo.kernels.dispatch import Backend


def run(pages: Pages, page_T: torch.Tensor, slot_T: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> None:
    """Implement `openmimo.kernels.attention.store`."""
    pages.keys_XPGK[page_T, slot_T] = _converted(k_TGK, pages.keys_XPGK.dtype)
    pages.values_XPGV[page_T, slot_T] = _converted(v_TGV, pages.values_XPGV.dtype)


def _converted(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int8:
        return write_rows(rows)
    largest = torch.finfo(dtype).max
    if largest < torch.finfo(rows.dtype).max:
        wide = torch.promote_types(rows.dtype, torch.float32)  # in bfloat16, the limit itself would be rounded up
        rows = rows.to(wide).clamp(-largest, largest)
    return rows.to(dtype)


PLUGIN = Backend(priority=0, run=run, refuse=lambda need: None)
