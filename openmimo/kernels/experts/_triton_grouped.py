"""Triton kernels around the grouped products of the experts of a prompt.

A visit is a token with one of its experts: visit m is token m // A. Visits are sorted by expert, in order. T tokens,
M visits, A active experts a token, E experts, D model dim, F expert hidden dim.
"""

import torch
import triton
import triton.language as tl

_BLOCK_VISITS = 2048
_BLOCK_NUMBERS = 1024


def sort_visits(expert_ids_TA: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the visits by expert.

    Returns:
        The sorted row of each visit, int32 [M]; the token of each sorted row, int32 [M]; the end of the rows of each
        expert, int32 [E].
    """
    expert_ids_TA = expert_ids_TA.contiguous()
    M, A, device = expert_ids_TA.numel(), expert_ids_TA.shape[1], expert_ids_TA.device
    counts_E, ends_E = (torch.empty(num_experts, dtype=torch.int32, device=device) for _ in range(2))
    row_M, token_M = (torch.empty(M, dtype=torch.int32, device=device) for _ in range(2))
    block = min(_BLOCK_VISITS, triton.next_power_of_2(M))
    _count[(num_experts,)](expert_ids_TA, counts_E, M, BLOCK=block)
    _place[(num_experts,)](
        expert_ids_TA, counts_E, ends_E, row_M, token_M, M, A, BLOCK=block,
        EXPERTS_PAD=triton.next_power_of_2(num_experts), NUM_EXPERTS=num_experts,
    )  # fmt: skip
    return row_M, token_M, ends_E


def gated(gate_up_MH: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [M, F], of rows that hold gate and up."""
    M, H = gate_up_MH.shape
    hidden_MF = gate_up_MH.new_empty(M, H // 2)
    block = min(_BLOCK_NUMBERS, triton.next_power_of_2(H // 2))
    _gate[(M, triton.cdiv(H // 2, block))](gate_up_MH, hidden_MF, H // 2, BLOCK=block)
    return hidden_MF


def combine_rows(y_MD: torch.Tensor, row_M: torch.Tensor, weights_TA: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the rows of each token, [T, D], in the order of its experts and in float32."""
    (T, A), D = weights_TA.shape, y_MD.shape[1]
    out_TD = y_MD.new_empty(T, D)
    block = min(_BLOCK_NUMBERS, triton.next_power_of_2(D))
    _combine[(T, triton.cdiv(D, block))](y_MD, row_M, weights_TA.contiguous(), out_TD, D, A=A, BLOCK=block)
    return out_TD


@triton.jit
def _count(expert_ids, counts, num_visits, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, num_visits, BLOCK):
        visits = first + tl.arange(0, BLOCK)
        total += (tl.load(expert_ids + visits, mask=visits < num_visits, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(total))


@triton.jit
def _place(
    expert_ids, counts, ends, row_of_visit, token_of_row, num_visits, A,
    BLOCK: tl.constexpr, EXPERTS_PAD: tl.constexpr, NUM_EXPERTS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_PAD)
    row = tl.sum(tl.load(counts + experts, mask=experts < tl.minimum(expert, NUM_EXPERTS), other=0))
    tl.store(ends + expert, row + tl.load(counts + expert))
    for first in range(0, num_visits, BLOCK):
        visits = first + tl.arange(0, BLOCK)
        is_mine = tl.load(expert_ids + visits, mask=visits < num_visits, other=-1) == expert
        number = is_mine.to(tl.int32)
        rows = row + tl.cumsum(number, axis=0) - 1
        tl.store(row_of_visit + visits, rows, mask=is_mine)
        tl.store(token_of_row + rows, visits // A, mask=is_mine)
        row += tl.sum(number)


@triton.jit
def _gate(gate_up, hidden, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    numbers = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * F + numbers, mask=numbers < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * F + numbers, mask=numbers < F, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(hidden + row * F + numbers, result.to(hidden.dtype.element_ty), mask=numbers < F)


@triton.jit
def _combine(y, row_of_visit, weights, out, D, A: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    numbers = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(A):
        row = tl.load(row_of_visit + token * A + place).to(tl.int64)
        numbers_of_row = tl.load(y + row * D + numbers, mask=numbers < D, other=0.0).to(tl.float32)
        total += tl.load(weights + token * A + place).to(tl.float32) * numbers_of_row
    tl.store(out + token * D + numbers, total.to(out.dtype.element_ty), mask=numbers < D)
