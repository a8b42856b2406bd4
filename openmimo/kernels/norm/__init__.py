"""Root-mean-square normalization (arXiv 1910.07467)."""

from typing import NamedTuple

import torch

from openmimo.kernels.dispatch import Dispatcher

DISPATCHER = Dispatcher("openmimo.kernels.norm", "OPENMIMO_NORM")


class NormNeed(NamedTuple):
    """The properties of one call; a backend decides from these alone whether it serves the call.

    Attributes:
        num_numbers: Number of elements of x.
        dtype: Dtype of x and the weight.
        needs_gradients: Whether autograd records. It does not matter whether x or the weight requires a gradient, so
            that frozen parameters do not change the bits of a training step.
        readable: Whether the weight has as many elements as a row of x.
        on_cpu: Whether x is in CPU memory.
    """

    num_numbers: int
    dtype: torch.dtype
    needs_gradients: bool
    readable: bool
    on_cpu: bool


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`x` [..., D] divided by its root mean square over D, times `weight` [D]; shape and dtype of x.

    The mean is computed in float32 (float64 for float64 x). The quotient is cast to the dtype of x before it is
    multiplied by the weight, as in Hugging Face transformers. Differentiable in x and weight.
    """
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    need = NormNeed(x.numel(), dtype, torch.is_grad_enabled(), weight.shape[0] == x.shape[-1], x.is_cpu)
    return DISPATCHER.choose(need)[1].run(x, weight, epsilon)
