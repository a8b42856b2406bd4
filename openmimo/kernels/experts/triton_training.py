"""Training on an accelerator: torch's grouped products, and one kernel for each step around them and their gradients.

Let w be the weight of a visit, h = silu(gate) * up, and g the gradient of the token's output. Forward:

    rows = x by expert;  gate, up = rows @ gate_up.T;  y = h @ down.T;  out = sum of w y over the visits of a token

Backward:

    G = g by expert;  U = G @ down;  grad w = U . h;  grad rows = gradient of gate, up from w U
    grad down = G.T @ (w h);  grad gate_up = (grad rows).T @ rows;  grad x = sum of (grad rows) @ gate_up of a token

The weight multiplies h and not g, so y is neither saved nor recomputed, and the kernel of `grad rows` recomputes h.
Saved are x and gate, up: to recompute gate and up would take a third more FLOPs in the backward pass. `rows` are copied
from x again.

No atomics, no wait of the host. Experts without tokens have zero gradients.

Not yet run on a GPU, so it is used only where `OPENMIMO_EXPERTS=triton_training` asks for it: the priority is below
that of `sorted_loop`, which serves everything.

T tokens, M visits, D model dim, E experts, A active experts a token, F expert hidden dim, H = 2F.
"""

from typing import Any

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.experts.grouped import refuse_grouped_mm, refuse_rows
from openmimo.kernels.operations import ExpertsNeed


def run(
    x_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    weights_TA: torch.Tensor,
    gate_up_EHD: torch.Tensor,
    down_EDF: torch.Tensor,
    *,
    need: ExpertsNeed,
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.apply_experts`."""
    return _Experts.apply(x_TD, expert_ids_TA, weights_TA, gate_up_EHD, down_EDF)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        expert_ids_TA: torch.Tensor,
        weights_TA: torch.Tensor,
        gate_up_EHD: torch.Tensor,
        down_EDF: torch.Tensor,
    ) -> torch.Tensor:
        from openmimo.kernels.experts._triton_grouped import combine_rows, gated, sort_visits
        from openmimo.kernels.experts._triton_training import spread_rows

        row_M, _, ends_E = sort_visits(expert_ids_TA, len(down_EDF))
        gate_up_MH = F.grouped_mm(spread_rows(x_TD, row_M), gate_up_EHD.transpose(1, 2), offs=ends_E)
        y_MD = F.grouped_mm(gated(gate_up_MH), down_EDF.transpose(1, 2), offs=ends_E)
        ctx.save_for_backward(x_TD, weights_TA, gate_up_EHD, down_EDF, row_M, ends_E, gate_up_MH)
        return combine_rows(y_MD, row_M, weights_TA)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from openmimo.kernels.experts._triton_training import gate_backward, spread_rows, sum_rows

        x_TD, weights_TA, gate_up_EHD, down_EDF, row_M, ends_E, gate_up_MH = ctx.saved_tensors
        needs_x, _, _, needs_gate_up, needs_down = ctx.needs_input_grad
        grad_x_TD = grad_gate_up_EHD = grad_down_EDF = None
        grad_MD = spread_rows(grad_TD, row_M)
        hidden_MF = F.grouped_mm(grad_MD, down_EDF, offs=ends_E)
        rows_MH, grad_weights_TA = gate_backward(gate_up_MH, hidden_MF, row_M, weights_TA.contiguous())
        if needs_down:
            grad_down_EDF = F.grouped_mm(grad_MD.T, hidden_MF, offs=ends_E)
        del grad_MD, hidden_MF  # their memory holds the rows that follow
        if needs_x:
            grad_x_TD = sum_rows(F.grouped_mm(rows_MH, gate_up_EHD, offs=ends_E), row_M, len(x_TD))
        if needs_gate_up:
            grad_gate_up_EHD = F.grouped_mm(rows_MH.T, spread_rows(x_TD, row_M), offs=ends_E)
        return grad_x_TD, None, grad_weights_TA, grad_gate_up_EHD, grad_down_EDF


def refuse(need: ExpertsNeed) -> str | None:
    """Refuse what torch's grouped product does not support. In Triton's interpreter, a CPU computes float32."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.num_tokens < 1:
        return "there are no tokens"
    return refuse_rows(need) if need.on_cpu else refuse_grouped_mm(need)


PLUGIN = Backend(priority=15, run=run, refuse=refuse)
