"""Small tensors on a CPU: one call, one thread (native/rows.c)."""

import torch

from openmimo.kernels import native
from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import NormNeed

MAX_NUMBERS = 1 << 18  # above this, torch's threads are faster
_RMS_NORM = native.Function("openmimo_rms_norm", "3P3qd")  # `norm_call` of native/rows.c


def run(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.rms_norm`; the weight has the dtype of x."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    dims = weight.shape[0]
    rows, is_bfloat16 = x.numel() // max(dims, 1), x.dtype == torch.bfloat16
    _RMS_NORM.call(_RMS_NORM.pack(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, dims, is_bfloat16, epsilon))
    return out


def refuse(need: NormNeed) -> str | None:
    """Refuse all but small float32 or bfloat16 tensors on a CPU, without gradients."""
    if need.num_numbers > MAX_NUMBERS:
        return f"torch is faster for more than {MAX_NUMBERS:,} numbers"
    if not need.readable:
        return "the weight does not have the size of a row"
    return native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
