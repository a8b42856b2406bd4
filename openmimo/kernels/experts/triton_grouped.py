"""Prompts on an accelerator: torch's grouped products, and one kernel for each step around them.

T tokens, D model dim, E experts, A active experts a token, F expert hidden dim.
"""

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.experts.grouped import refuse_grouped_mm
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
    from openmimo.kernels.experts._triton_grouped import combine_rows, gated, sort_visits

    row_M, token_M, ends_E = sort_visits(expert_ids_TA, need.num_experts)
    gate_up_MH = F.grouped_mm(x_TD.index_select(0, token_M), gate_up_EHD.transpose(1, 2), offs=ends_E)
    y_MD = F.grouped_mm(gated(gate_up_MH), down_EDF.transpose(1, 2), offs=ends_E)
    return combine_rows(y_MD, row_M, weights_TA)


def refuse(need: ExpertsNeed) -> str | None:
    """Refuse training, and what torch's grouped product does not support."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.needs_gradients:
        return "it has no backward pass"
    return refuse_grouped_mm(need)


PLUGIN = Backend(priority=70, run=run, refuse=refuse)
