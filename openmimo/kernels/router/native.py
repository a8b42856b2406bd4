"""Few tokens on a CPU in one call (native/rows.c). Batch invariance: a token's bits do not depend on the others.

T tokens, D model dim, E experts, A active experts a token.
"""

import torch

from openmimo.kernels import native
from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import RouterNeed, RoutingRule

MAX_TOKENS = 32
_ROUTER = native.Function("openmimo_router", "5P8qd")  # `router_call` of native/rows.c


def run(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor,
    rule: RoutingRule,
    replayed_TA: None,
    keep_scores: bool,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Implement `openmimo.kernels.operations.route`."""
    T, D = x_TD.shape
    x_TD, weight_ED, bias_E = x_TD.contiguous(), weight_ED.contiguous(), bias_E.contiguous()
    ids_TA = x_TD.new_empty(T, rule.experts_per_token, dtype=torch.int64)
    weights_TA = x_TD.new_empty(T, rule.experts_per_token, dtype=torch.float32)
    bfloat16 = torch.bfloat16
    call = _ROUTER.pack(
        x_TD.data_ptr(),
        weight_ED.data_ptr(),
        bias_E.data_ptr(),
        ids_TA.data_ptr(),
        weights_TA.data_ptr(),
        *(T, D, weight_ED.shape[0], rule.experts_per_token, rule.normalize_weights),
        *(x_TD.dtype == bfloat16, weight_ED.dtype == bfloat16, bias_E.dtype == bfloat16),
        rule.routed_scale,
    )
    _ROUTER.call(call)
    return ids_TA, weights_TA, None


def refuse(need: RouterNeed) -> str | None:
    """Refuse all but few tokens on a CPU, without groups and gradients, whose weight has the dtype of x or float32."""
    if need.grouped or need.replayed or need.keep_scores:
        return "it supports no groups of experts, no replayed choices, and no scores of all experts"
    if not 1 <= need.num_tokens <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} tokens, not {need.num_tokens}"
    if need.weight_dtype not in (need.dtype, torch.float32):
        return f"the weight is {need.weight_dtype}, which is neither float32 nor the dtype of x"
    if not need.readable:
        return "the sizes of x and weight differ"
    return native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
