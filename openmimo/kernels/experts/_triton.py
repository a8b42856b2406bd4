"""Triton kernels of the experts for few tokens.

A visit is a token with one of its experts: visit m is token m // A. Four kernels, each with fixed shapes:

    list      a program per expert: the visits of the expert, in order, and their number
    gate, up  a program per expert and tile of F: silu(gate) * up of each visit; it reads its rows of the weight once
              for 16 visits, and ends at once if the expert has no visit
    down      a program per expert and tile of D: the output of each visit
    combine   a program per token: the weighted sum over its visits, in order

The result of a visit does not depend on the other visits.
"""

import torch
import triton
import triton.language as tl

_TILE_VISITS = 16


def run_experts(
    x_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    weights_TA: torch.Tensor,
    gate_up_EHD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Arguments as in `openmimo.kernels.operations.apply_experts`; weights are contiguous."""
    T, D = x_TD.shape
    E, _, F = down_EDF.shape
    A = expert_ids_TA.shape[1]
    M = T * A
    x_TD, expert_ids_TA, weights_TA = x_TD.contiguous(), expert_ids_TA.contiguous(), weights_TA.contiguous()
    visits_EM = torch.empty(E, M, dtype=torch.int32, device=x_TD.device)
    counts_E = torch.empty(E, dtype=torch.int32, device=x_TD.device)
    _list_visits[(E,)](expert_ids_TA, visits_EM, counts_E, M, VISITS_PAD=triton.next_power_of_2(M))
    precision = "ieee" if x_TD.dtype == torch.float32 else "tf32"
    hidden_MF = x_TD.new_empty(M, F)
    tile = min(32, max(16, triton.next_power_of_2(F)))
    _gate_up[(triton.cdiv(F, tile), E)](
        x_TD, gate_up_EHD, hidden_MF, visits_EM, counts_E, M, D, F,
        A=A, TILE_VISITS=_TILE_VISITS, TILE=tile, BLOCK=min(128, max(16, triton.next_power_of_2(D))),
        PRECISION=precision, num_warps=4, num_stages=4,
    )  # fmt: skip
    outputs_MD = x_TD.new_empty(M, D)
    tile = min(32, max(16, triton.next_power_of_2(D)))
    _down[(triton.cdiv(D, tile), E)](
        hidden_MF, down_EDF, outputs_MD, visits_EM, counts_E, M, D, F,
        TILE_VISITS=_TILE_VISITS, TILE=tile, BLOCK=min(128, max(16, triton.next_power_of_2(F))),
        PRECISION=precision, num_warps=4, num_stages=4,
    )  # fmt: skip
    out_TD = torch.empty_like(x_TD)
    block = min(1024, triton.next_power_of_2(D))
    _combine[(T, triton.cdiv(D, block))](outputs_MD, weights_TA, out_TD, D, A=A, BLOCK=block)
    return out_TD


@triton.jit
def _list_visits(expert_ids, visits, counts, num_visits, VISITS_PAD: tl.constexpr):
    expert = tl.program_id(0)
    numbers = tl.arange(0, VISITS_PAD)
    is_mine = tl.load(expert_ids + numbers, mask=numbers < num_visits, other=-1) == expert
    place = tl.cumsum(is_mine.to(tl.int32), axis=0) - 1
    tl.store(visits + expert * num_visits + place, numbers, mask=is_mine)
    tl.store(counts + expert, tl.sum(is_mine.to(tl.int32)))


@triton.jit
def _gate_up(
    x, gate_up, hidden, visits, counts, num_visits, D, F,
    A: tl.constexpr, TILE_VISITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_column = columns < F
    gate_rows = gate_up + (expert.to(tl.int64) * 2 * F + columns)[None, :] * D
    up_rows = gate_rows + F * D
    count = tl.load(counts + expert)
    for first in range(0, count, TILE_VISITS):
        rows = first + tl.arange(0, TILE_VISITS)
        is_row = rows < count
        visit = tl.load(visits + expert * num_visits + rows, mask=is_row, other=0)
        inputs = x + (visit // A)[:, None] * D
        gate = tl.zeros((TILE_VISITS, TILE), tl.float32)
        up = tl.zeros((TILE_VISITS, TILE), tl.float32)
        for start in range(0, D, BLOCK):
            dims = start + tl.arange(0, BLOCK)
            numbers = tl.load(inputs + dims[None, :], mask=is_row[:, None] & (dims < D)[None, :], other=0.0)
            is_weight = (dims < D)[:, None] & is_column[None, :]
            weight = tl.load(gate_rows + dims[:, None], mask=is_weight, other=0.0)
            gate += tl.dot(numbers, weight, input_precision=PRECISION)
            weight = tl.load(up_rows + dims[:, None], mask=is_weight, other=0.0)
            up += tl.dot(numbers, weight, input_precision=PRECISION)
        result = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(
            hidden + visit[:, None] * F + columns[None, :],
            result.to(hidden.dtype.element_ty),
            mask=is_row[:, None] & is_column[None, :],
        )


@triton.jit
def _down(
    hidden, down, outputs, visits, counts, num_visits, D, F,
    TILE_VISITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_column = columns < D
    weight_rows = down + (expert.to(tl.int64) * D + columns)[None, :] * F
    count = tl.load(counts + expert)
    for first in range(0, count, TILE_VISITS):
        rows = first + tl.arange(0, TILE_VISITS)
        is_row = rows < count
        visit = tl.load(visits + expert * num_visits + rows, mask=is_row, other=0)
        output = tl.zeros((TILE_VISITS, TILE), tl.float32)
        for start in range(0, F, BLOCK):
            dims = start + tl.arange(0, BLOCK)
            numbers = tl.load(
                hidden + visit[:, None] * F + dims[None, :], mask=is_row[:, None] & (dims < F)[None, :], other=0.0
            )
            weight = tl.load(weight_rows + dims[:, None], mask=(dims < F)[:, None] & is_column[None, :], other=0.0)
            output += tl.dot(numbers, weight, input_precision=PRECISION)
        tl.store(
            outputs + visit[:, None] * D + columns[None, :],
            output.to(outputs.dtype.element_ty),
            mask=is_row[:, None] & is_column[None, :],
        )


@triton.jit
def _combine(outputs, weights, out, D, A: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in tl.static_range(A):
        visit = token * A + number
        total += tl.load(weights + visit) * tl.load(outputs + visit * D + dims, mask=dims < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + dims, total.to(out.dtype.element_ty), mask=dims < D)
