"""One kernel for the routing of a token: logits in float32, sigmoid, the best experts, their weights.

The host does not wait for the result, so a graph can capture it.
"""

import torch

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.operations import RouterNeed, RoutingRule

_MAX_TOKENS = 512  # every token reads the whole weight


def run(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor,
    rule: RoutingRule,
    replayed_TA: torch.Tensor | None,
    keep_scores: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Implement `openmimo.kernels.operations.route`."""
    from openmimo.kernels.router._triton import choose_experts

    assert replayed_TA is None and not keep_scores, "refused"
    ids_TA, weights_TA = choose_experts(x_TD, weight_ED, bias_E, rule)
    return ids_TA, weights_TA, None


def refuse(need: RouterNeed) -> str | None:
    """Decoding on an accelerator with one group of experts."""
    if reason := triton_unavailable(need.on_cpu, need.dtype):
        return reason
    if need.needs_gradients or need.replayed or need.keep_scores or need.grouped:
        return "it does not train, replay routes, return scores or divide experts into groups"
    if need.weight_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it does not read a weight of {need.weight_dtype}"
    if not 1 <= need.num_tokens <= _MAX_TOKENS:
        return f"it takes 1 to {_MAX_TOKENS} tokens, not {need.num_tokens}"
    return None if need.readable else "the weight does not fit the tokens"


PLUGIN = Backend(priority=80, run=run, refuse=refuse)
