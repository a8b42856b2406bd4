"""The Triton kernel of the router: a program for each token."""

import torch
import triton
import triton.language as tl

from openmimo.kernels.operations import RoutingRule

_TILE_NUMBERS = 8192  # of the weight


def choose_experts(
    x_TD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor, rule: RoutingRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids, int64 [T, A], and weights, float32 [T, A]; arguments as in `openmimo.kernels.operations.route`."""
    T, D = x_TD.shape
    E, A = len(weight_ED), rule.experts_per_token
    ids_TA = torch.empty(T, A, dtype=torch.int64, device=x_TD.device)
    weights_TA = torch.empty(T, A, dtype=torch.float32, device=x_TD.device)
    experts_pad = triton.next_power_of_2(E)
    _choose[(T,)](
        x_TD, weight_ED, bias_E, ids_TA, weights_TA, x_TD.stride(0), x_TD.stride(1), weight_ED.stride(0), D,
        rule.routed_scale,
        E=E, EXPERTS_PAD=experts_pad, A=A, A_PAD=triton.next_power_of_2(A),
        BLOCK=max(16, min(triton.next_power_of_2(D), _TILE_NUMBERS // experts_pad)),
        NORMALIZES=rule.normalize_weights, num_warps=8,
    )  # fmt: skip
    return ids_TA, weights_TA


@triton.jit
def _choose(
    x, weight, bias, ids, weights, stride_t, stride_d, stride_e, D, routed_scale,
    E: tl.constexpr, EXPERTS_PAD: tl.constexpr, A: tl.constexpr, A_PAD: tl.constexpr, BLOCK: tl.constexpr,
    NORMALIZES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_PAD)
    is_expert = experts < E
    products = tl.zeros((EXPERTS_PAD, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        dims = start + tl.arange(0, BLOCK)
        numbers = tl.load(x + token * stride_t + dims * stride_d, mask=dims < D, other=0.0).to(tl.float32)
        rows = tl.load(
            weight + experts[:, None] * stride_e + dims[None, :],
            mask=is_expert[:, None] & (dims < D)[None, :],
            other=0.0,
        )
        products += rows.to(tl.float32) * numbers[None, :]
    scores = 1.0 / (1.0 + tl.exp(-tl.sum(products, axis=1)))
    biased = scores + tl.load(bias + experts, mask=is_expert, other=0.0).to(tl.float32)
    biased = tl.where(is_expert, biased, float("-inf"))
    places = tl.arange(0, A_PAD)
    chosen = tl.zeros((A_PAD,), tl.int32)
    chosen_scores = tl.zeros((A_PAD,), tl.float32)
    for number in tl.static_range(A):
        # NaN scores choose arbitrary experts, but never one that does not exist
        best = tl.minimum(tl.argmax(biased, axis=0), E - 1)
        score = tl.sum(tl.where(experts == best, scores, 0.0))
        chosen = tl.where(places == number, best, chosen)
        chosen_scores = tl.where(places == number, score, chosen_scores)
        biased = tl.where(experts == best, float("-inf"), biased)
    if NORMALIZES:
        chosen_scores = chosen_scores / (tl.sum(chosen_scores) + 1e-20)
    tl.store(ids + token * A + places, chosen.to(tl.int64), mask=places < A)
    tl.store(weights + token * A + places, chosen_scores * routed_scale, mask=places < A)
