"""Decoding on an accelerator: each expert reads its weights once for its tokens. The host waits for nothing.

T tokens, A active experts a token, D model dim, E experts, F expert hidden dim.
"""

import torch

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.operations import ExpertsNeed
from openmimo.kernels.weights import PLAIN

_MAX_TOKENS = 256  # above, sorted tokens and torch's grouped product are faster


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
    from openmimo.kernels.experts._triton import run_experts

    return run_experts(x_TD, expert_ids_TA, weights_TA, gate_up_EHD.contiguous(), down_EDF.contiguous())


def refuse(need: ExpertsNeed) -> str | None:
    """A few tokens on an accelerator, plain weights, no gradients."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.weight_format != PLAIN:
        return f"its weights are plain, not {need.weight_format}"
    if need.needs_gradients:
        return "it has no backward pass"
    if not 1 <= need.num_tokens <= _MAX_TOKENS:
        return f"it takes 1 to {_MAX_TOKENS} tokens, not {need.num_tokens}"
    return None


PLUGIN = Backend(priority=80, run=run, refuse=refuse)
