"""Whether Triton kernels can run here.

The backends in Triton import it in their first call, so that nothing on a CPU imports it.
"""

import functools
import importlib.util
import os

import torch


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def unavailable(on_cpu: bool, dtype: torch.dtype) -> str | None:
    """Why a Triton kernel cannot serve a call; None if it can.

    Args:
        on_cpu: Whether the tensors are in CPU memory. Triton's interpreter serves them if TRITON_INTERPRET is set.
        dtype: Dtype of the products.
    """
    if on_cpu and not os.environ.get("TRITON_INTERPRET"):
        return "Triton kernels run on accelerators"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it does not compute {dtype}"
    if on_cpu and dtype == torch.bfloat16:
        return "Triton's interpreter does not compute bfloat16"
    return None if _is_installed() else "Triton is not installed"
