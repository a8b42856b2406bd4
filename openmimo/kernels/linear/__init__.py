"""Linear layers: x W^T + b, of one weight, or of several that share their input.

R rows, D input dim, O output dim.
"""

from typing import NamedTuple

import torch

from openmimo.kernels.dispatch import Dispatcher

DISPATCHER = Dispatcher("openmimo.kernels.linear", "OPENMIMO_LINEAR")
WeightAndBias = tuple[torch.Tensor, torch.Tensor | None]


class LinearNeed(NamedTuple):
    """What one call asks for: all that a backend may look at before it accepts.

    num_rows: None unless x is [R, D]. readable: weights and biases are contiguous, and of the dtype and sizes that x
    asks for, so that a backend may read them by address.
    """

    num_rows: int | None
    dtype: torch.dtype
    needs_gradients: bool
    readable: bool
    on_cpu: bool


def linear(x: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., D] to [..., O]. All are of one dtype; differentiable in all."""
    return joined_linear(x, ((weight_OD, bias_O),))


def joined_linear(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Several linear layers of one input x [..., D], side by side: [..., sum of their O].

    layers: a weight [O, D] and a bias [O] or None each, in the dtype of x. Differentiable in all.
    """
    dtype, input_dim, readable = x.dtype, x.shape[-1], True
    for weight_OD, bias_O in layers:
        if weight_OD.dtype != dtype or weight_OD.shape[1] != input_dim or not weight_OD.is_contiguous():
            readable = False
        elif bias_O is not None:
            readable &= bias_O.dtype == dtype and bias_O.shape == weight_OD.shape[:1] and bias_O.is_contiguous()
    need = LinearNeed(
        x.shape[0] if x.dim() == 2 else None,
        dtype,
        torch.is_grad_enabled() and _is_trained(x, layers),
        readable,
        x.is_cpu,
    )
    return DISPATCHER.choose(need)[1].run(x, layers)


def _is_trained(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> bool:
    tensors = (x, *(tensor for layer in layers for tensor in layer))
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
