"""Triton kernels of the router: the scores of a token and a few experts, then the choice of each token."""

import torch
import triton
import triton.language as tl

from openmimo.kernels.operations import RoutingRule

_TILE_EXPERTS = 8
_BLOCK = 512


def choose_experts(
    x_TD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor, rule: RoutingRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return expert ids, int64 [T, A], and weights, float32 [T, A].

    Arguments as in `openmimo.kernels.operations.route`.
    """
    T, D = x_TD.shape
    E, A = len(weight_ED), rule.experts_per_token
    scores_TE = torch.empty(T, E, dtype=torch.float32, device=x_TD.device)
    _score[(T, triton.cdiv(E, _TILE_EXPERTS))](
        x_TD, weight_ED, scores_TE, x_TD.stride(0), x_TD.stride(1), weight_ED.stride(0), D,
        E=E, TILE=_TILE_EXPERTS, BLOCK=min(_BLOCK, triton.next_power_of_2(D)),
    )  # fmt: skip
    ids_TA = torch.empty(T, A, dtype=torch.int64, device=x_TD.device)
    weights_TA = torch.empty(T, A, dtype=torch.float32, device=x_TD.device)
    _choose[(T,)](
        scores_TE, bias_E, ids_TA, weights_TA, rule.routed_scale,
        E=E, EXPERTS_PAD=triton.next_power_of_2(E), A=A, A_PAD=triton.next_power_of_2(A),
        NORMALIZES=rule.normalize_weights, num_warps=2,
    )  # fmt: skip
    return ids_TA, weights_TA


@triton.jit
def _score(
    x, weight, scores, stride_t, stride_d, stride_e, D, E: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0)
    experts = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_expert = experts < E
    products = tl.zeros((TILE, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        dims = start + tl.arange(0, BLOCK)
        numbers = tl.load(x + token * stride_t + dims * stride_d, mask=dims < D, other=0.0).to(tl.float32)
        rows = tl.load(
            weight + experts[:, None] * stride_e + dims[None, :],
            mask=is_expert[:, None] & (dims < D)[None, :],
            other=0.0,
        )
        products += rows.to(tl.float32) * numbers[None, :]
    result = 1.0 / (1.0 + tl.exp(-tl.sum(products, axis=1)))
    tl.store(scores + token * E + experts, result, mask=is_expert)


@triton.jit
def _choose(
    scores, bias, ids, weights, routed_scale,
    E: tl.constexpr, EXPERTS_PAD: tl.constexpr, A: tl.constexpr, A_PAD: tl.constexpr, NORMALIZES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_PAD)
    is_expert = experts < E
    own = tl.load(scores + token * E + experts, mask=is_expert, other=0.0)
    biased = own + tl.load(bias + experts, mask=is_expert, other=0.0).to(tl.float32)
    biased = tl.where(is_expert, biased, float("-inf"))
    places = tl.arange(0, A_PAD)
    chosen = tl.zeros((A_PAD,), tl.int32)
    chosen_scores = tl.zeros((A_PAD,), tl.float32)
    for number in tl.static_range(A):
        # NaN scores choose arbitrary experts, but never one that does not exist
        best = tl.minimum(tl.argmax(biased, axis=0), E - 1)
        score = tl.sum(tl.where(experts == best, own, 0.0))
        chosen = tl.where(places == number, best, chosen)
        chosen_scores = tl.where(places == number, score, chosen_scores)
        biased = tl.where(experts == best, float("-inf"), biased)
    if NORMALIZES:
        chosen_scores = chosen_scores / (tl.sum(chosen_scores) + 1e-20)
    tl.store(ids + token * A + places, chosen.to(tl.int64), mask=places < A)
    tl.store(weights + token * A + places, chosen_scores * routed_scale, mask=places < A)
