"""The router of a sparse layer in one native call, for a few tokens on a CPU. `model/moe.py` defines what it computes.

T tokens, D model dim, E experts, A active experts a token.
"""

import functools
import struct

import torch

from openmimo.kernels import native

MAX_TOKENS = 32
_CALL = struct.Struct("5P8qd")  # `router_call` of native/rows.c


def serves(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> bool:
    """Whether `route` takes these: 1 to 32 tokens on a CPU, both of one dtype or the weights wider, no gradients."""
    return (
        x_TD.is_cpu
        and 1 <= x_TD.shape[0] <= MAX_TOKENS
        and x_TD.dtype in native.DTYPES
        and weight_ED.dtype in (x_TD.dtype, torch.float32)
        and weight_ED.shape[1] == x_TD.shape[1]
        and not torch.is_grad_enabled()
        and native.library() is not None
    )


def route(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor,
    *,
    experts_per_token: int,
    normalize_weights: bool,
    routed_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids, int64 [T, A], best first by sigmoid score plus `bias_E`, and weights, float32 [T, A].

    The weights are the scores, divided by their sum if `normalize_weights`, times `routed_scale`. Everything runs in
    float32, and a token's bits do not depend on the others.
    """
    T, D = x_TD.shape
    x_TD, weight_ED, bias_E = x_TD.contiguous(), weight_ED.contiguous(), bias_E.contiguous()
    ids_TA = x_TD.new_empty(T, experts_per_token, dtype=torch.int64)
    weights_TA = x_TD.new_empty(T, experts_per_token, dtype=torch.float32)
    bfloat16 = torch.bfloat16
    call = _CALL.pack(
        x_TD.data_ptr(),
        weight_ED.data_ptr(),
        bias_E.data_ptr(),
        ids_TA.data_ptr(),
        weights_TA.data_ptr(),
        *(T, D, weight_ED.shape[0], experts_per_token, normalize_weights),
        *(x_TD.dtype == bfloat16, weight_ED.dtype == bfloat16, bias_E.dtype == bfloat16),
        routed_scale,
    )
    _entry()(call)
    return ids_TA, weights_TA


@functools.cache
def _entry() -> native.Entry:
    return native.entry("openmimo_router")
