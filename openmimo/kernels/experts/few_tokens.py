"""Decoding of a few tokens: products of each token with its experts' weights in place, without sorting.

T tokens, D model dim, E experts, A active experts a token, F expert hidden dim.
"""

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import ExpertsNeed
from openmimo.kernels.weights import PLAIN

MAX_TOKENS = 8


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
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    weights_TA = weights_TA.to(wide)
    rows = []
    for token, experts in enumerate(expert_ids_TA.tolist()):
        x_1D = x_TD[token : token + 1]
        outputs = []
        for expert in experts:
            gate, up = F.linear(x_1D, gate_up_EHD[expert]).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down_EDF[expert]))
        y_AD = torch.cat(outputs)
        rows.append(weights_TA[token : token + 1] @ (y_AD if y_AD.dtype == wide else y_AD.to(wide)))
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(x_TD.dtype)


def refuse(need: ExpertsNeed) -> str | None:
    """Refuse all but a few tokens on a CPU, without gradients."""
    if need.weight_format != PLAIN:
        return f"its weights are plain, not {need.weight_format}"
    if need.needs_gradients:
        return "it has no backward pass"
    if not need.on_cpu:
        return "it runs on CPUs only: it reads the chosen experts on the host"
    if not 1 <= need.num_tokens <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} tokens, not {need.num_tokens}"
    return None


PLUGIN = Backend(priority=60, run=run, refuse=refuse)
