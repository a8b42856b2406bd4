"""Bfloat16 on a CPU without bfloat16 instructions: products in float32, for which each weight is converted temporarily.

R rows, D input dim, O output dim.
"""

from typing import Any

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import LinearNeed, WeightAndBias
from openmimo.kernels.weights import PLAIN
from openmimo.runtime.device import cpu_multiplies_bfloat16


def run(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.joined_linear`."""
    outputs = [_Widened.apply(x, weight_OD, bias_O) for weight_OD, bias_O in layers]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class _Widened(torch.autograd.Function):
    """Saves the bfloat16 tensors for the backward pass, which converts them again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight_OD)
        return F.linear(x.float(), weight_OD.float(), None if bias_O is None else bias_O.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_OD = ctx.saved_tensors
        wide_RO = gradient.float().flatten(0, -2)
        grad_x = grad_weight_OD = grad_bias_O = None
        if ctx.needs_input_grad[0]:
            grad_x = (wide_RO @ weight_OD.float()).to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight_OD = (wide_RO.T @ x.float().flatten(0, -2)).to(weight_OD.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias_O = wide_RO.sum(dim=0).to(weight_OD.dtype)
        return grad_x, grad_weight_OD, grad_bias_O


def refuse(need: LinearNeed) -> str | None:
    """Refuse all but bfloat16 on a CPU without bfloat16 instructions."""
    if need.weight_format != PLAIN:
        return f"its weights are plain, not {need.weight_format}"
    if not need.on_cpu:
        return "it runs on CPUs only"
    if need.dtype != torch.bfloat16:
        return f"it computes bfloat16 only, not {need.dtype}"
    if not need.readable:
        return "a weight or bias is not contiguous, or does not have the dtype and size that x requires"
    if cpu_multiplies_bfloat16():
        return "this CPU multiplies bfloat16 itself"
    return None


PLUGIN = Backend(priority=50, run=run, refuse=refuse)
