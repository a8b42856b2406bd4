"""Decoding on an accelerator: each expert reads its weights once for its tokens. The host waits for nothing.

Prompts through block-scaled experts take the same kernels, in pieces.

T tokens, A active experts a token, D model dim, E experts, F expert hidden dim.
"""

import torch

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.operations import ExpertsNeed
from openmimo.kernels.weights import FP8, INT8, PLAIN, BlockScaled, Weight

_MAX_PLAIN_TOKENS = 256  # above, sorted tokens and torch's grouped product are faster
_PIECE_TOKENS = 2048


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
    from openmimo.kernels.experts._triton import run_experts

    gate_up_EHD, down_EDF = _contiguous(gate_up_EHD), _contiguous(down_EDF)
    if need.num_tokens <= _PIECE_TOKENS:
        return run_experts(x_TD, expert_ids_TA, weights_TA, gate_up_EHD, down_EDF)
    pieces = zip(*(tensor.split(_PIECE_TOKENS) for tensor in (x_TD, expert_ids_TA, weights_TA)), strict=True)
    return torch.cat([run_experts(x, ids, weights, gate_up_EHD, down_EDF) for x, ids, weights in pieces])


def _contiguous(weight: Weight) -> Weight:
    if isinstance(weight, torch.Tensor):
        return weight.contiguous()
    assert isinstance(weight, BlockScaled), "other formats are refused"
    return BlockScaled(weight.codes.contiguous(), weight.scales.contiguous(), weight.block)


def refuse(need: ExpertsNeed) -> str | None:
    """No gradients; plain weights only with few tokens. Block-scaled weights need 16-bit tokens and even dims."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.weight_format not in (PLAIN, INT8, FP8):
        return f"its weights are plain, int8 with a scale for each output or fp8, not {need.weight_format}"
    if need.weight_format != PLAIN and need.dtype == torch.float32:
        return "it multiplies block-scaled weights and numbers of 16 bits"
    if need.weight_format != PLAIN and (need.model_dim % 2 or need.expert_dim % 2):
        return "it reads codes in pairs, and a row has an odd number of them"
    if need.needs_gradients:
        return "it has no backward pass"
    if need.num_tokens < 1:
        return "there are no tokens"
    if need.weight_format == PLAIN and need.num_tokens > _MAX_PLAIN_TOKENS:
        return f"it takes up to {_MAX_PLAIN_TOKENS} tokens with plain weights, not {need.num_tokens}"
    return None


PLUGIN = Backend(priority=80, run=run, refuse=refuse)
