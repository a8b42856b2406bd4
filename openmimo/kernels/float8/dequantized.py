"""Codes as in the definition, and products of their values in bfloat16: the arithmetic of FP8 without its speed.

It serves accelerators until their own kernels are asked for by name. A value, a code times its scale, is rounded to
bfloat16, which changes it by a 16th of what its quantization has. Torch's operations suffice, and the host waits for
nothing.

P rows, C and O the dims of a weight [O, C], K summed dim, N output dim.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.float8.reference import FUNCTIONS
from openmimo.kernels.operations import Float8Need
from openmimo.kernels.weights import BlockScaled

_ALIGNMENT = 8  # numbers of 16 bits in 16 bytes


def multiply(
    rows_PK: BlockScaled, weight_ENK: BlockScaled, ends_E: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Implement `Float8Functions.multiply`."""
    values_PK, values_ENK = rows_PK.dequantize(torch.bfloat16), weight_ENK.dequantize(torch.bfloat16)
    if ends_E is None:
        return F.linear(values_PK, values_ENK[0]).to(dtype)
    return F.grouped_mm(values_PK, values_ENK.mT, offs=ends_E).to(dtype)


def weight_gradient(gradient_OP: BlockScaled, input_CP: BlockScaled, ends_E: torch.Tensor | None) -> torch.Tensor:
    """Implement `Float8Functions.weight_gradient`."""
    values_OP, values_CP = gradient_OP.dequantize(torch.bfloat16), input_CP.dequantize(torch.bfloat16)
    if ends_E is None:
        return (values_OP @ values_CP.T).float()[None]
    if values_OP.shape[1] == 0:  # torch's grouped product refuses the strides of matrices without columns
        return values_OP.new_zeros(len(ends_E), len(values_OP), len(values_CP), dtype=torch.float32)
    return F.grouped_mm(values_OP, values_CP.T, offs=ends_E).float()


def refuse(need: Float8Need) -> str | None:
    """Refuse CPUs, which compute the definition, and what torch's grouped product does not support."""
    if need.on_cpu:
        return "a CPU computes the definition"
    if need.dtype != torch.bfloat16:
        return f"it computes in bfloat16, not {need.dtype}"
    if any(dim % _ALIGNMENT for dim in need.dims):
        return f"a dim of {', '.join(map(str, need.dims))} is not a multiple of {_ALIGNMENT}"
    return None


PLUGIN = Backend(priority=20, run=replace(FUNCTIONS, multiply=multiply, weight_gradient=weight_gradient), refuse=refuse)
