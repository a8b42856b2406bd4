"""Hopper's tensor cores for 8-bit numbers: kernels for codes, scales and products in Triton.

They have not yet run on a GPU, so a run has to ask for them: OPENMIMO_FLOAT8=triton.
"""

import os

import torch

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.operations import FLOAT8, Float8Functions, Float8Need
from openmimo.kernels.weights import FP8_BLOCK, BlockScaled, Float8Latent


def quantize(
    rows_NC: torch.Tensor, places_P: torch.Tensor | None, with_transposed: bool
) -> tuple[BlockScaled, BlockScaled | None]:
    """Implement `Float8Functions.quantize`."""
    from openmimo.kernels.float8 import _triton

    return _triton.quantize(rows_NC, places_P, with_transposed)


def quantize_weight(weights: tuple[Float8Latent, ...], transpose: bool) -> BlockScaled:
    """Implement `Float8Functions.quantize_weight`."""
    from openmimo.kernels.float8 import _triton

    return _triton.quantize_weight(weights, transpose)


def multiply(
    rows_PK: BlockScaled, weight_ENK: BlockScaled, ends_E: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Implement `Float8Functions.multiply`."""
    from openmimo.kernels.float8 import _triton

    return _triton.multiply(rows_PK, weight_ENK, ends_E, dtype)


def weight_gradient(gradient_OP: BlockScaled, input_CP: BlockScaled, ends_E: torch.Tensor | None) -> torch.Tensor:
    """Implement `Float8Functions.weight_gradient`."""
    from openmimo.kernels.float8 import _triton

    return _triton.weight_gradient(gradient_OP, input_CP, ends_E)


def gate(
    gate_up_PH: torch.Tensor, weights_P: torch.Tensor, for_backward: bool
) -> tuple[BlockScaled, BlockScaled | None]:
    """Implement `Float8Functions.gate`."""
    from openmimo.kernels.float8 import _triton

    return _triton.gate(gate_up_PH, weights_P, for_backward)


def gate_backward(
    gate_up_PH: BlockScaled, weights_P: torch.Tensor, gradient_PF: torch.Tensor, with_transposed: bool
) -> tuple[BlockScaled | None, BlockScaled, BlockScaled | None, torch.Tensor]:
    """Implement `Float8Functions.gate_backward`."""
    from openmimo.kernels.float8 import _triton

    return _triton.gate_backward(gate_up_PH, weights_P, gradient_PF, with_transposed)


def refuse(need: Float8Need) -> str | None:
    """Refuse all but calls of whole blocks on an accelerator, in a process that names this backend."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if any(dim % FP8_BLOCK for dim in need.dims):
        return f"a dim of {', '.join(map(str, need.dims))} is not a multiple of {FP8_BLOCK}"
    if os.environ.get(FLOAT8.variable) != "triton":
        return f"it has not yet run on a GPU; ask for it with {FLOAT8.variable}=triton"
    return None


_FUNCTIONS = Float8Functions(quantize, quantize_weight, multiply, weight_gradient, gate, gate_backward)
PLUGIN = Backend(priority=80, run=_FUNCTIONS, refuse=refuse)
