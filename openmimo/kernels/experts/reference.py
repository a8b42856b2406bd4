"""The definition: a loop over experts, each applied to the tokens that chose it."""

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.linear import reference as linear
from openmimo.kernels.operations import ExpertsNeed
from openmimo.kernels.weights import Weight, unbind


def run(
    x_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    weights_TA: torch.Tensor,
    gate_up_EHD: Weight,
    down_EDF: Weight,
    *,
    need: ExpertsNeed,
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.apply_experts`."""
    dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    out_TD = torch.zeros(x_TD.shape, dtype=dtype, device=x_TD.device)
    for expert, (gate_up_HD, down_DF) in enumerate(zip(unbind(gate_up_EHD), unbind(down_EDF), strict=True)):
        token, slot = torch.where(expert_ids_TA == expert)
        gate, up = linear.run(x_TD[token], ((gate_up_HD, None),)).chunk(2, dim=-1)
        y = linear.run(F.silu(gate) * up, ((down_DF, None),))
        out_TD = out_TD.index_add(0, token, y.to(dtype) * weights_TA[token, slot, None].to(dtype))
    return out_TD.to(x_TD.dtype)


PLUGIN = Backend(priority=0, run=run, refuse=lambda need: None)
