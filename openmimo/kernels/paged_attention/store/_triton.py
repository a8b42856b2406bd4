"""The Triton kernel of the page store: a program for each token."""

import torch
import triton
import triton.language as tl

from openmimo.kernels.attention import Pages


def store_rows(
    pages: Pages, page_T: torch.Tensor, slot_T: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor
) -> None:
    """Arguments as in `openmimo.kernels.attention.store`."""
    keys, values = pages.keys_XPGK, pages.values_XPGV
    key_numbers, value_numbers = k_TGK.shape[1] * k_TGK.shape[2], v_TGV.shape[1] * v_TGV.shape[2]
    _store[(len(k_TGK),)](
        k_TGK, v_TGV, keys, values, page_T, slot_T,
        k_TGK.stride(0), v_TGV.stride(0), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        torch.finfo(keys.dtype).max,
        KEYS=key_numbers, KEYS_PAD=triton.next_power_of_2(key_numbers),
        VALUES=value_numbers, VALUES_PAD=triton.next_power_of_2(value_numbers),
        SATURATES=torch.finfo(keys.dtype).max < torch.finfo(k_TGK.dtype).max,
    )  # fmt: skip


@triton.jit
def _store(
    k, v, keys, values, page_T, slot_T, stride_k, stride_v, stride_kx, stride_kp, stride_vx, stride_vp, limit,
    KEYS: tl.constexpr, KEYS_PAD: tl.constexpr, VALUES: tl.constexpr, VALUES_PAD: tl.constexpr, SATURATES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    page, slot = tl.load(page_T + token), tl.load(slot_T + token)
    if page >= 0:
        numbers = tl.arange(0, KEYS_PAD)
        row = tl.load(k + token * stride_k + numbers, mask=numbers < KEYS, other=0.0)
        if SATURATES:
            row = tl.minimum(tl.maximum(row.to(tl.float32), -limit), limit)
        place = keys + page * stride_kx + slot * stride_kp
        tl.store(place + numbers, row.to(keys.dtype.element_ty), mask=numbers < KEYS)
        numbers = tl.arange(0, VALUES_PAD)
        row = tl.load(v + token * stride_v + numbers, mask=numbers < VALUES, other=0.0)
        if SATURATES:
            row = tl.minimum(tl.maximum(row.to(tl.float32), -limit), limit)
        place = values + page * stride_vx + slot * stride_vp
        tl.store(place + numbers, row.to(values.dtype.element_ty), mask=numbers < VALUES)
