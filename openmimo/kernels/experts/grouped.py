"""Expert MLPs as two grouped matrix products of torch on sorted tokens.

T tokens, D model dim, E experts, A active experts a token, F expert hidden dim.
"""

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.experts._sorting import combine, sort_by_expert
from openmimo.kernels.operations import ExpertsNeed
from openmimo.kernels.weights import PLAIN

_ALIGNMENT_BYTES = 16


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
    sorted_tokens = sort_by_expert(x_TD, expert_ids_TA, need.num_experts)
    ends_E = sorted_tokens.counts_E.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(sorted_tokens.rows_PD, gate_up_EHD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    y_PD = F.grouped_mm(F.silu(gate) * up, down_EDF.transpose(1, 2), offs=ends_E)
    return combine(y_PD, sorted_tokens.row_M, weights_TA)


def refuse_grouped_mm(need: ExpertsNeed) -> str | None:
    """Refuse what torch's kernel does not support, and CPUs, where it is slower than a loop."""
    if need.on_cpu:
        return "on a CPU torch's grouped product is slower than the loop over experts"
    if need.dtype != torch.bfloat16:
        return f"torch's grouped product computes bfloat16, not {need.dtype}"
    return refuse_rows(need)


def refuse_rows(need: ExpertsNeed) -> str | None:
    """Refuse weights that are not plain, and rows that torch's grouped product does not read on any device."""
    if need.weight_format != PLAIN:
        return f"its weights are plain, not {need.weight_format}"
    if any(need.dtype.itemsize * dim % _ALIGNMENT_BYTES for dim in (need.model_dim, need.expert_dim)):
        return f"the size of a row is not a multiple of {_ALIGNMENT_BYTES} bytes"
    return None


PLUGIN = Backend(priority=50, run=run, refuse=refuse_grouped_mm)
