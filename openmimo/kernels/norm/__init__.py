"""Root-mean-square normalization (arXiv 1910.07467)."""

from typing import NamedTuple

import torch

from openmimo.kernels.dispatch import Dispatcher

DISPATCHER = Dispatcher("openmimo.kernels.norm", "OPENMIMO_NORM")


class NormNeed(NamedTuple):
    """Everything about one call that a backend may look at.

    Attributes:
        num_numbers: Of x.
        dtype: Of x, and of the weight.
        needs_gradients: Whether autograd records, also where neither x nor the weight requires a gradient: a training
            step then has the same bits whichever parameters are frozen.
        readable: Whether the weight has as many numbers as a row of x.
        on_cpu: Whether x lies in the memory of the CPU.
    """

    num_numbers: int
    dtype: torch.dtype
    needs_gradients: bool
    readable: bool
    on_cpu: bool


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`x` [..., D] divided by its root mean square over D, times `weight` [D]; shape and dtype of x.

    The mean is taken in float32 (float64 stays); the quotient is cast to the dtype of x before the weight multiplies
    it, as Hugging Face does. Differentiable in x and weight.
    """
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    need = NormNeed(x.numel(), dtype, torch.is_grad_enabled(), weight.shape[0] == x.shape[-1], x.is_cpu)
    return DISPATCHER.choose(need)[1].run(x, weight, epsilon)
