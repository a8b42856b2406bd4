"""Linear layers: x W^T + b, of one weight, or of several that share their input.

R rows, D input dim, O output dim.
"""

from typing import NamedTuple

import torch

from openmimo.kernels.dispatch import Dispatcher
from openmimo.kernels.weights import PLAIN, BlockScaled, Weight

DISPATCHER = Dispatcher("openmimo.kernels.linear", "OPENMIMO_LINEAR")
WeightAndBias = tuple[Weight, torch.Tensor | None]
MIXED = "mixed"


class LinearNeed(NamedTuple):
    """The properties of a call by which a backend accepts or refuses it.

    Attributes:
        num_rows: R if x is [R, D], else None.
        dtype: Of x.
        needs_gradients: Whether autograd records the call.
        readable: Weights and biases are contiguous and have the sizes that x requires, and plain ones its dtype. So a
            backend may read them by address.
        on_cpu: Whether the tensors are in the memory of the CPU.
        weight_format: The format of all weights (see `kernels.weights`), or "mixed".
    """

    num_rows: int | None
    dtype: torch.dtype
    needs_gradients: bool
    readable: bool
    on_cpu: bool
    weight_format: str = PLAIN


def linear(x: torch.Tensor, weight_OD: Weight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., D] to [..., O]; see `joined_linear`."""
    return joined_linear(x, ((weight_OD, bias_O),))


def joined_linear(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Several linear layers of one input x [..., D], side by side: [..., sum of their O] in the dtype of x.

    Args:
        x: The input; differentiable.
        layers: A weight [O, D] and a bias [O] or None each. Plain weights and biases have the dtype of x and are
            differentiable. Block-scaled weights are constants.
    """
    dtype, input_dim, readable, weight_format = x.dtype, x.shape[-1], True, None
    for weight_OD, bias_O in layers:
        if isinstance(weight_OD, BlockScaled):
            this_format, fits = weight_OD.format, weight_OD.is_contiguous()
        else:
            this_format, fits = PLAIN, weight_OD.dtype == dtype and weight_OD.is_contiguous()
        if this_format != weight_format:
            weight_format = MIXED if weight_format else this_format
        if not fits or weight_OD.shape[1] != input_dim:
            readable = False
        elif bias_O is not None:
            readable &= bias_O.dtype == dtype and bias_O.shape == weight_OD.shape[:1] and bias_O.is_contiguous()
    need = LinearNeed(
        x.shape[0] if x.dim() == 2 else None,
        dtype,
        torch.is_grad_enabled() and _is_trained(x, layers),
        readable,
        x.is_cpu,
        weight_format or PLAIN,
    )
    return DISPATCHER.choose(need)[1].run(x, layers)


def _is_trained(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> bool:
    return x.requires_grad or any(
        weight_OD.requires_grad or (bias_O is not None and bias_O.requires_grad) for weight_OD, bias_O in layers
    )
