"""Small tensors on a CPU: one call, one thread (native/rows.c)."""

import torch

from openmimo.kernels import native
from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import RotaryNeed

MAX_NUMBERS = 1 << 18  # above this, torch's threads are faster
_ROTARY = native.Function("openmimo_rotary", "4P8q")  # `rotary_call` of native/rows.c


def run(x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.apply_rotary`."""
    T, H, K = x_THK.shape
    out_THK = x_THK.new_empty(T, H, K)
    row_stride, head_stride, _ = x_THK.stride()
    call = _ROTARY.pack(
        x_THK.data_ptr(),
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        out_THK.data_ptr(),
        *(T, H, K, cos_TR.shape[1], row_stride, head_stride, cos_TR.stride(0), x_THK.dtype == torch.bfloat16),
    )
    _ROTARY.call(call)
    return out_THK


def refuse(need: RotaryNeed) -> str | None:
    """Refuse all but small float32 or bfloat16 tensors on a CPU, without gradients."""
    if need.num_numbers > MAX_NUMBERS:
        return f"torch is faster for more than {MAX_NUMBERS:,} numbers"
    if not need.readable:
        return "x and the tables differ in dtype, rows or layout"
    return native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
