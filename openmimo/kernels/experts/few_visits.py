"""Decoding with quantized experts on a CPU. Each chosen expert is read once for all of its tokens.

A token's output has the same bits in every batch if the linear layers have that property.

T tokens, D model dim, E experts, A active experts a token, F expert hidden dim.
"""

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import MIXED, ExpertsNeed, linear
from openmimo.kernels.weights import PLAIN, BlockScaled, Latent, Packed

MAX_TOKENS = 32  # the row limit of the C kernels of linear layers


def run(
    x_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    weights_TA: torch.Tensor,
    gate_up_EHD: BlockScaled | Packed | Latent,
    down_EDF: BlockScaled | Packed | Latent,
    *,
    need: ExpertsNeed,
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.apply_experts`."""
    visits: dict[int, list[int]] = {}
    for visit, expert in enumerate(expert_ids_TA.flatten().tolist()):
        visits.setdefault(expert, []).append(visit)
    y_VD = x_TD.new_empty(expert_ids_TA.numel(), need.model_dim)
    for expert, expert_visits in visits.items():
        rows = x_TD[[visit // need.experts_per_token for visit in expert_visits]]
        gate, up = linear(rows, gate_up_EHD.select(expert)).chunk(2, dim=-1)
        y = linear(F.silu(gate) * up, down_EDF.select(expert))
        y_VD[expert_visits] = y
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    weights_TA1 = weights_TA.to(wide)[..., None]
    return (y_VD.view(*expert_ids_TA.shape, need.model_dim).to(wide) * weights_TA1).sum(dim=1).to(x_TD.dtype)


def refuse(need: ExpertsNeed) -> str | None:
    """Refuse all but a few tokens on a CPU with quantized experts, without gradients."""
    if need.weight_format in (PLAIN, MIXED):
        return f"its weights are quantized, not {need.weight_format}"
    if need.needs_gradients:
        return "it has no backward pass"
    if not need.on_cpu:
        return "it runs on CPUs only: it reads the chosen experts on the host"
    if not 1 <= need.num_tokens <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} tokens, not {need.num_tokens}"
    return None


PLUGIN = Backend(priority=60, run=run, refuse=refuse)
