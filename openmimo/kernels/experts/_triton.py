"""Triton kernels of the experts for few tokens.

A visit is a token with one of its experts: visit m is token m // A. Three kernels, each with fixed shapes:

    gate, up  a program per expert and tile of F: silu(gate) * up of each visit; it reads its rows of the weight once
              for 16 visits (up to 64 if block-scaled experts have many)
    down      a program per expert and tile of D: the output of each visit
    combine   a program per token: the weighted sum over its visits, in order

With few visits there is a program per visit instead of one per expert. It computes the expert of its visit if no
earlier visit has the same expert, and otherwise ends at once. The expert ids give it the other visits of the expert. So
a single token does not start thousands of programs without work. With more visits, a kernel before lists the visits of
each expert.

The result of a visit does not depend on the other visits. Block-scaled weights are multiplied as in
`openmimo.kernels.linear._triton`.
"""

import torch
import triton
import triton.language as tl

from openmimo.kernels.linear._triton import (
    PAIRS,
    TILE,
    add_block,
    codes_of,
    pairs_of,
    prepare,
    prepared_block,
    scale_pairs_of,
)
from openmimo.kernels.weights import BlockScaled, Weight

_TILE_VISITS = 16
_MAX_UNLISTED_VISITS = 64
_STAGES = 4
_LONG_TILES = ((8, 32), (24, 64))  # mean visits of an expert, and visits of a tile above that mean
_LONG_STAGES = 3
_LISTED_AT_ONCE = 2048


def run_experts(
    x_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    weights_TA: torch.Tensor,
    gate_up_EHD: Weight,
    down_EDF: Weight,
) -> torch.Tensor:
    """Arguments as in `openmimo.kernels.operations.apply_experts`; weights are contiguous."""
    T, D = x_TD.shape
    E, _, F = down_EDF.shape
    A = expert_ids_TA.shape[1]
    M = T * A
    x_TD, expert_ids_TA, weights_TA = x_TD.contiguous(), expert_ids_TA.contiguous(), weights_TA.contiguous()
    hidden_MF, outputs_MD = x_TD.new_empty(M, F), x_TD.new_empty(M, D)
    visits_pad, is_listed = triton.next_power_of_2(M), M > _MAX_UNLISTED_VISITS
    lists, programs = expert_ids_TA, M
    if is_listed:
        lists, programs = torch.empty(E, 1 + M, dtype=torch.int32, device=x_TD.device), E
        _list_visits[(E,)](expert_ids_TA, lists, M, BLOCK=min(visits_pad, _LISTED_AT_ONCE))
        visits_pad = 1  # not used, and kernels are compiled for each value
    tile_visits = _tile_visits(M, E) if isinstance(gate_up_EHD, BlockScaled) else _TILE_VISITS
    visits = dict(
        lists=lists, num_visits=M, VISITS_PAD=visits_pad, TILE_VISITS=tile_visits, IS_LISTED=is_listed, num_warps=4,
        num_stages=_STAGES if tile_visits == _TILE_VISITS else _LONG_STAGES,
    )  # fmt: skip
    if isinstance(gate_up_EHD, BlockScaled):
        assert isinstance(down_EDF, BlockScaled)
        kind = dict(PAIRS=PAIRS, TILE=TILE, CODES=codes_of(gate_up_EHD))
        scales = gate_up_EHD.scales
        _gate_up_scaled[(triton.cdiv(F, TILE), programs)](
            *prepare(x_TD), pairs_of(gate_up_EHD.codes), scales, hidden_MF, T, D // 2, F,
            scales.stride(0), scales.stride(1), gate_up_EHD.block[0],
            SCALE_PAIRS=scale_pairs_of(gate_up_EHD), A=A, **kind, **visits,
        )  # fmt: skip
        scales = down_EDF.scales
        _down_scaled[(triton.cdiv(D, TILE), programs)](
            *prepare(hidden_MF), pairs_of(down_EDF.codes), scales, outputs_MD, D, F // 2,
            scales.stride(0), scales.stride(1), down_EDF.block[0],
            SCALE_PAIRS=scale_pairs_of(down_EDF), **kind, **visits,
        )  # fmt: skip
    else:
        precision = "ieee" if x_TD.dtype == torch.float32 else "tf32"
        tile = min(32, max(16, triton.next_power_of_2(F)))
        _gate_up[(triton.cdiv(F, tile), programs)](
            x_TD, gate_up_EHD, hidden_MF, D, F,
            A=A, TILE=tile, BLOCK=min(128, max(16, triton.next_power_of_2(D))), PRECISION=precision, **visits,
        )  # fmt: skip
        tile = min(32, max(16, triton.next_power_of_2(D)))
        _down[(triton.cdiv(D, tile), programs)](
            hidden_MF, down_EDF, outputs_MD, D, F,
            TILE=tile, BLOCK=min(128, max(16, triton.next_power_of_2(F))), PRECISION=precision, **visits,
        )  # fmt: skip
    out_TD = torch.empty_like(x_TD)
    block = min(1024, triton.next_power_of_2(D))
    _combine[(T, triton.cdiv(D, block))](outputs_MD, weights_TA, out_TD, D, A=A, BLOCK=block)
    return out_TD


def _tile_visits(num_visits: int, num_experts: int) -> int:
    """Visits that a program of block-scaled experts computes at once, most of which should have work."""
    return max([_TILE_VISITS, *(tile for mean, tile in _LONG_TILES if num_visits > mean * num_experts)])


@triton.jit
def _list_visits(expert_ids, lists, num_visits, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    own = lists + expert * (1 + num_visits)
    count = tl.program_id(0) * 0
    for first in range(0, num_visits, BLOCK):
        numbers = first + tl.arange(0, BLOCK)
        is_mine = tl.load(expert_ids + numbers, mask=numbers < num_visits, other=-1) == expert
        tl.store(own + count + tl.cumsum(is_mine.to(tl.int32), axis=0), numbers, mask=is_mine)
        count += tl.sum(is_mine.to(tl.int32))
    tl.store(own, count)


@triton.jit
def _work_of(program, lists, num_visits, VISITS_PAD: tl.constexpr, IS_LISTED: tl.constexpr):
    """The expert of a program, its number of visits (0: nothing to do), and what `_visits_at` needs.

    `lists` has the count and the visits of each expert, or the expert ids.
    """
    if IS_LISTED:
        own = lists + program * (1 + num_visits)
        return program.to(tl.int64), tl.load(own), own + 1
    else:
        numbers = tl.arange(0, VISITS_PAD)
        ids = tl.load(lists + numbers, mask=numbers < num_visits, other=-1)
        expert = tl.load(lists + program).to(tl.int64)
        is_mine = ids == expert
        is_first = tl.sum((is_mine & (numbers < program)).to(tl.int32)) == 0
        count = tl.where(is_first, tl.sum(is_mine.to(tl.int32)), 0)
        return expert, count, tl.where(is_mine, tl.cumsum(is_mine.to(tl.int32), axis=0) - 1, -1)


@triton.jit
def _visits_at(rows, is_row, own_visits, VISITS_PAD: tl.constexpr, IS_LISTED: tl.constexpr):
    """The visits of these ranks among those of the expert; 0 for ranks that no visit has."""
    if IS_LISTED:
        return tl.load(own_visits + rows, mask=is_row, other=0)
    else:
        numbers = tl.arange(0, VISITS_PAD)
        return tl.sum(tl.where(own_visits[None, :] == rows[:, None], numbers[None, :], 0), axis=1)


@triton.jit
def _gate_up(
    x, gate_up, hidden, D, F, lists, num_visits,
    A: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, VISITS_PAD: tl.constexpr,
    TILE_VISITS: tl.constexpr, IS_LISTED: tl.constexpr,
):  # fmt: skip
    expert, count, own_visits = _work_of(tl.program_id(1), lists, num_visits, VISITS_PAD, IS_LISTED)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_column = columns < F
    gate_rows = gate_up + (expert * 2 * F + columns)[None, :] * D
    up_rows = gate_rows + F * D
    for first in range(0, count, TILE_VISITS):
        rows = first + tl.arange(0, TILE_VISITS)
        is_row = rows < count
        visit = _visits_at(rows, is_row, own_visits, VISITS_PAD, IS_LISTED)
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
        tl.store(hidden + visit[:, None] * F + columns[None, :], result, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _down(
    hidden, down, outputs, D, F, lists, num_visits,
    TILE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, VISITS_PAD: tl.constexpr,
    TILE_VISITS: tl.constexpr, IS_LISTED: tl.constexpr,
):  # fmt: skip
    expert, count, own_visits = _work_of(tl.program_id(1), lists, num_visits, VISITS_PAD, IS_LISTED)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_column = columns < D
    weight_rows = down + (expert * D + columns)[None, :] * F
    for first in range(0, count, TILE_VISITS):
        rows = first + tl.arange(0, TILE_VISITS)
        is_row = rows < count
        visit = _visits_at(rows, is_row, own_visits, VISITS_PAD, IS_LISTED)
        output = tl.zeros((TILE_VISITS, TILE), tl.float32)
        for start in range(0, F, BLOCK):
            dims = start + tl.arange(0, BLOCK)
            numbers = tl.load(
                hidden + visit[:, None] * F + dims[None, :], mask=is_row[:, None] & (dims < F)[None, :], other=0.0
            )
            weight = tl.load(weight_rows + dims[:, None], mask=(dims < F)[:, None] & is_column[None, :], other=0.0)
            output += tl.dot(numbers, weight, input_precision=PRECISION)
        tl.store(outputs + visit[:, None] * D + columns[None, :], output, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _gate_up_scaled(
    x, magnitudes, codes, scales, hidden, num_tokens, num_pairs, F, stride_e, stride_o, block_rows, lists, num_visits,
    A: tl.constexpr, TILE: tl.constexpr, PAIRS: tl.constexpr, SCALE_PAIRS: tl.constexpr, CODES: tl.constexpr,
    VISITS_PAD: tl.constexpr, TILE_VISITS: tl.constexpr, IS_LISTED: tl.constexpr,
):  # fmt: skip
    expert, count, own_visits = _work_of(tl.program_id(1), lists, num_visits, VISITS_PAD, IS_LISTED)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_column = columns < F
    gate_rows = codes + (expert * 2 * F + columns) * num_pairs
    up_rows = gate_rows + F * num_pairs
    gate_scales = scales + expert * stride_e + columns // block_rows * stride_o
    up_scales = scales + expert * stride_e + (F + columns) // block_rows * stride_o
    for first in range(0, count, TILE_VISITS):
        rows = first + tl.arange(0, TILE_VISITS)
        is_row = rows < count
        visit = _visits_at(rows, is_row, own_visits, VISITS_PAD, IS_LISTED)
        gate = tl.zeros((TILE, TILE_VISITS), tl.float32)
        up = tl.zeros((TILE, TILE_VISITS), tl.float32)
        for start in range(0, num_pairs, PAIRS):
            even, odd, magnitude = prepared_block(
                x, magnitudes, visit // A, is_row, start, num_tokens, tl.cdiv(num_pairs, PAIRS), PAIRS
            )
            gate = add_block(
                gate, gate_rows, gate_scales, is_column, even, odd, magnitude, start, num_pairs, PAIRS, SCALE_PAIRS,
                CODES,
            )  # fmt: skip
            up = add_block(
                up, up_rows, up_scales, is_column, even, odd, magnitude, start, num_pairs, PAIRS, SCALE_PAIRS, CODES
            )
        result = tl.trans(gate / (1.0 + tl.exp(-gate)) * up)
        tl.store(hidden + visit[:, None] * F + columns[None, :], result, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _down_scaled(
    hidden, magnitudes, codes, scales, outputs, D, num_pairs, stride_e, stride_o, block_rows, lists, num_visits,
    TILE: tl.constexpr, PAIRS: tl.constexpr, SCALE_PAIRS: tl.constexpr, CODES: tl.constexpr,
    VISITS_PAD: tl.constexpr, TILE_VISITS: tl.constexpr, IS_LISTED: tl.constexpr,
):  # fmt: skip
    expert, count, own_visits = _work_of(tl.program_id(1), lists, num_visits, VISITS_PAD, IS_LISTED)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_column = columns < D
    code_rows = codes + (expert * D + columns) * num_pairs
    scale_rows = scales + expert * stride_e + columns // block_rows * stride_o
    for first in range(0, count, TILE_VISITS):
        rows = first + tl.arange(0, TILE_VISITS)
        is_row = rows < count
        visit = _visits_at(rows, is_row, own_visits, VISITS_PAD, IS_LISTED)
        output = tl.zeros((TILE, TILE_VISITS), tl.float32)
        for start in range(0, num_pairs, PAIRS):
            even, odd, magnitude = prepared_block(
                hidden, magnitudes, visit, is_row, start, num_visits, tl.cdiv(num_pairs, PAIRS), PAIRS
            )
            output = add_block(
                output, code_rows, scale_rows, is_column, even, odd, magnitude, start, num_pairs, PAIRS, SCALE_PAIRS,
                CODES,
            )  # fmt: skip
        tl.store(
            outputs + visit[:, None] * D + columns[None, :], tl.trans(output),
            mask=is_row[:, None] & is_column[None, :],
        )  # fmt: skip


@triton.jit
def _combine(outputs, weights, out, D, A: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in tl.static_range(A):
        visit = token * A + number
        total += tl.load(weights + visit) * tl.load(outputs + visit * D + dims, mask=dims < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + dims, total, mask=dims < D)
