"""Expert MLPs in a loop over experts on sorted tokens.

The rows of an expert are contiguous, so each expert is two dense products, with weights of any format. Inference skips
experts without tokens.

T tokens, D model dim, E experts, A active experts a token, F expert hidden dim, P rows of the sorted buffer.
"""

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.experts._sorting import combine, sort_by_expert
from openmimo.kernels.operations import ExpertsNeed, linear
from openmimo.kernels.weights import Weight, unbind
from openmimo.runtime.device import cpu_multiplies_bfloat16

# oneDNN compiles a bfloat16 product for each new number of rows, which takes longer than the product itself. With
# unpadded counts, a step of the tiny model spent half its time on compilation (docs/log.md). Rows are therefore padded
# to a multiple, which is an eighth to a quarter of the mean number of rows per expert.
_MAX_MULTIPLE = 64


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
    sorted_tokens = sort_by_expert(x_TD, expert_ids_TA, need.num_experts, multiple=_row_multiple(need))
    counts = sorted_tokens.counts_E.tolist()
    outputs = [x_TD.new_empty(0, need.model_dim)]
    # The backward pass of unbind stacks the experts' gradients once. That of indexing would allocate the full gradient
    # for each expert.
    parts = zip(sorted_tokens.rows_PD.split(counts), unbind(gate_up_EHD), unbind(down_EDF), strict=True)
    for rows_PD, gate_up_HD, down_DF in parts:
        if len(rows_PD) or need.needs_gradients:
            gate, up = linear(rows_PD, gate_up_HD).chunk(2, dim=-1)
            outputs.append(linear(F.silu(gate) * up, down_DF))
    return combine(torch.cat(outputs), sorted_tokens.row_M, weights_TA)


def _row_multiple(need: ExpertsNeed) -> int:
    multiple, rows_per_expert = 1, need.num_tokens * need.experts_per_token // need.num_experts
    if need.dtype == torch.bfloat16 and cpu_multiplies_bfloat16():
        while multiple < _MAX_MULTIPLE and 8 * multiple <= rows_per_expert:
            multiple *= 2
    return multiple


PLUGIN = Backend(priority=20, run=run, refuse=lambda need: None)
