"""Triton kernels of drafting.

A program of the plan computes a block of rows of one pass. It counts the rows of all sequences, adds them up, and finds
the sequence of each of its rows by comparison:

    rows of sequences     3    1    4
    ends                  3    4    8
    row 5                 3 <= 5, 4 <= 5, not 8 <= 5: sequence 2

B sequences, H heads, L = H + 1, Q rows of all passes, M numbers of a row of memory, p parts, Y rows of page tables.
"""

import torch
import triton
import triton.language as tl

from openmimo.kernels.operations import (
    MIX_ADDEND,
    MIX_LAST_SHIFT,
    MIX_ROUNDS,
    ROW_HEADS,
    ROW_KEY,
    ROW_LENGTH,
    ROW_STATES_START,
    UNIFORM_BITS,
    DraftingRows,
    DraftingSizes,
    signed,
)

_BLOCK_ROWS = 32
_BLOCK = 256
_LENGTH, _STATES_START = tl.constexpr(ROW_LENGTH), tl.constexpr(ROW_STATES_START)
_KEY, _HEADS = tl.constexpr(ROW_KEY), tl.constexpr(ROW_HEADS)
_ADDEND, _LAST_SHIFT = tl.constexpr(signed(MIX_ADDEND)), tl.constexpr(MIX_LAST_SHIFT)
_FIRST_SHIFT, _FIRST_FACTOR = tl.constexpr(MIX_ROUNDS[0][0]), tl.constexpr(signed(MIX_ROUNDS[0][1]))
_SECOND_SHIFT, _SECOND_FACTOR = tl.constexpr(MIX_ROUNDS[1][0]), tl.constexpr(signed(MIX_ROUNDS[1][1]))
_UNIFORM_SHIFT, _UNIFORM_UNIT = tl.constexpr(64 - UNIFORM_BITS), tl.constexpr(2.0**-UNIFORM_BITS)


def plan_rows(
    rows_XM: torch.Tensor,
    seats_B: torch.Tensor,
    limits_B: torch.Tensor,
    max_lengths_B: torch.Tensor,
    sizes: DraftingSizes,
) -> DraftingRows:
    """Arguments as in `openmimo.kernels.operations.plan_drafting`."""
    B, L, Q = len(seats_B), sizes.num_heads + 1, sizes.num_rows
    counts, keys = rows_XM.new_empty(2, L, B, dtype=torch.int32).unbind(0)
    first, last = rows_XM.new_empty(2, L, B).unbind(0)
    sequence, position, state, token, source, seat = rows_XM.new_empty(6, Q).unbind(0)
    is_row = rows_XM.new_empty(Q, dtype=torch.bool)
    uniform = rows_XM.new_empty(Q, dtype=torch.float64)
    tokens = rows_XM.new_zeros(L, B)
    longest = max(sizes.head_rows if sizes.num_heads else 0, sizes.main_rows)
    _plan[(L, triton.cdiv(longest, _BLOCK_ROWS))](
        rows_XM, seats_B, limits_B, max_lengths_B, counts, keys, first, last, sequence, position, is_row, state, token,
        source, uniform, seat, tokens, B, sizes.head_rows, sizes.main_rows, sizes.spare_place, H=sizes.num_heads,
        COLUMNS=rows_XM.shape[1], FIRST_TOKEN=sizes.first_token, RING=sizes.ring_positions,
        SEQUENCES=triton.next_power_of_2(B), BLOCK=_BLOCK_ROWS, num_warps=4,
    )  # fmt: skip
    return DraftingRows(
        counts, keys, first, last, sequence, position, is_row, state, token, source, uniform, seat, tokens
    )


def find_slots(
    tables_pBY: torch.Tensor, rows: DraftingRows, whole_from_B: torch.Tensor, page_positions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments as in `openmimo.kernels.operations.drafting_slots`."""
    (parts, B, Y), Q = tables_pBY.shape, len(rows.position_Q)
    page_pQ, offset_Q = rows.position_Q.new_empty(parts, Q), rows.position_Q.new_empty(Q)
    _slots[(triton.cdiv(Q, _BLOCK), parts)](
        tables_pBY.contiguous(), rows.sequence_Q, rows.position_Q, rows.is_row_Q, whole_from_B, page_pQ, offset_Q, B, Y,
        Q, PAGE=page_positions, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return page_pQ, offset_Q


def insert_tokens(token_T: torch.Tensor, source_T: torch.Tensor, tokens_LB: torch.Tensor) -> torch.Tensor:
    """Arguments as in `openmimo.kernels.operations.insert_drafts`."""
    out_T, T = torch.empty_like(token_T), len(token_T)
    _insert[(triton.cdiv(T, _BLOCK),)](token_T, source_T, tokens_LB, out_T, T, BLOCK=_BLOCK, num_warps=4)
    return out_T


def advance_rows(
    rows_XM: torch.Tensor,
    seats_B: torch.Tensor,
    max_lengths_B: torch.Tensor,
    rows: DraftingRows,
    decided_T: torch.Tensor,
    sizes: DraftingSizes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments as in `openmimo.kernels.operations.advance_texts`."""
    B, L, M = len(seats_B), sizes.num_heads + 1, rows_XM.shape[1]
    new_BM, results_BX = rows_XM.new_empty(B, M), rows_XM.new_empty(B, L + 2)
    _advance[(B,)](
        rows_XM, seats_B, max_lengths_B, rows.counts_LB[-1], rows.first_LB[-1], rows.tokens_LB, decided_T, new_BM,
        results_BX, B, len(decided_T), sizes.num_drafts, L=L, COLUMNS=M, FIRST_TOKEN=sizes.first_token,
        RING=sizes.ring_positions, BLOCK_L=triton.next_power_of_2(L), BLOCK_M=triton.next_power_of_2(M), num_warps=1,
    )  # fmt: skip
    return new_BM, results_BX


@triton.jit
def _right(values, COUNT: tl.constexpr):
    """Bits of int64 moved to the right, with zeros on the left."""
    return (values.to(tl.uint64, bitcast=True) >> COUNT).to(tl.int64, bitcast=True)


@triton.jit
def _random_numbers(keys, positions):
    """As `random_numbers` of the reference, bit by bit."""
    mixed = (keys ^ positions) + _ADDEND
    mixed = (mixed ^ _right(mixed, _FIRST_SHIFT)) * _FIRST_FACTOR
    mixed = (mixed ^ _right(mixed, _SECOND_SHIFT)) * _SECOND_FACTOR
    mixed = mixed ^ _right(mixed, _LAST_SHIFT)
    return _right(mixed, _UNIFORM_SHIFT).to(tl.float64) * _UNIFORM_UNIT


@triton.jit
def _of_row(is_mine, values):
    """The value of the sequence of each row."""
    return tl.sum(tl.where(is_mine, values[None, :], 0), axis=1)


@triton.jit
def _plan(
    rows, seats, limits, max_lengths, counts, keys, firsts, lasts, sequences, positions, is_rows, states, tokens,
    sources, uniforms, seat_of_row, newest, num_sequences, head_rows, main_rows, spare_place, H: tl.constexpr,
    COLUMNS: tl.constexpr, FIRST_TOKEN: tl.constexpr, RING: tl.constexpr, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    is_head = number < H
    b = tl.arange(0, SEQUENCES)
    is_b = b < num_sequences
    seat = tl.load(seats + b, mask=is_b, other=0)
    row = rows + seat * COLUMNS
    length = tl.load(row + _LENGTH, mask=is_b, other=1)
    states_start = tl.load(row + _STATES_START, mask=is_b, other=0)
    room = tl.maximum(tl.load(max_lengths + b, mask=is_b, other=1) - 1 - length, 0)
    drafts = tl.minimum(tl.load(limits + b, mask=is_b, other=-1), room)
    if H > 0:
        can_draft = tl.maximum(tl.load(row + _HEADS, mask=is_b, other=0), states_start) < length - 1
        drafts = tl.where(can_draft, drafts, tl.minimum(drafts, 0))
    own_start = tl.maximum(tl.load(row + _HEADS + number, mask=is_b & is_head, other=0), states_start)
    start = tl.where(is_head, own_start, length - 1)
    count = tl.where(is_head, tl.where(drafts > number, length - 1 - start, 0), drafts + 1)
    count = tl.where(is_b, count, 0)
    first = tl.cumsum(count, axis=0) - count
    total = tl.sum(count, axis=0)
    if tl.program_id(1) == 0:
        own = number * num_sequences + b
        tl.store(counts + own, count.to(tl.int32), mask=is_b)
        tl.store(keys + own, tl.where(count > 0, start + count, 0).to(tl.int32), mask=is_b)
        tl.store(firsts + own, first, mask=is_b)
        tl.store(lasts + own, tl.maximum(first + count - 1, 0), mask=is_b)
        if number == H:
            token = tl.load(row + FIRST_TOKEN + ((length - 1) & (RING - 1)), mask=is_b, other=0)
            tl.store(newest + b, token, mask=is_b)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    num_rows = tl.where(is_head, head_rows, main_rows)
    is_t = t < num_rows
    is_before = ((first + count)[None, :] <= t[:, None]) & is_b[None, :]
    sequence = tl.minimum(tl.sum(is_before.to(tl.int32), axis=1), num_sequences - 1)
    is_mine = b[None, :] == sequence[:, None]
    is_row = t < total
    sequence = sequence.to(tl.int64)
    position = tl.where(is_row, t + _of_row(is_mine, start - first), 0)
    own_length, own_seat = _of_row(is_mine, length), _of_row(is_mine, seat)
    own_row = rows + own_seat * COLUMNS
    index = position + tl.where(is_head, number + 1, 0)
    later = index - own_length + 1
    source = tl.minimum(tl.maximum(later, 0), H) * num_sequences + sequence
    source = tl.where(is_head, tl.where(later > 0, source, -1), tl.where(is_row, source, sequence))
    place = number * head_rows + t
    tl.store(sequences + place, sequence, mask=is_t)
    tl.store(positions + place, position, mask=is_t)
    tl.store(is_rows + place, is_row, mask=is_t)
    tl.store(states + place, tl.where(is_row, own_seat * RING + (position & (RING - 1)), spare_place), mask=is_t)
    tl.store(tokens + place, tl.load(own_row + FIRST_TOKEN + (index & (RING - 1)), mask=is_t, other=0), mask=is_t)
    tl.store(sources + place, source, mask=is_t)
    key = tl.load(own_row + _KEY, mask=is_t, other=0)
    tl.store(uniforms + place, _random_numbers(key, position + 1), mask=is_t)
    tl.store(seat_of_row + place, own_seat, mask=is_t)


@triton.jit
def _slots(
    tables, sequences, positions, is_rows, whole_from, pages, offsets, num_sequences, table_rows, num_rows,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < num_rows
    sequence = tl.load(sequences + row, mask=is_row, other=0)
    position = tl.load(positions + row, mask=is_row, other=0)
    has_page = tl.load(is_rows + row, mask=is_row, other=0) != 0
    has_page = has_page & (position >= tl.load(whole_from + sequence, mask=is_row, other=0))
    table = tables + (part * num_sequences + sequence) * table_rows
    page = tl.load(table + position // PAGE, mask=has_page, other=-1).to(tl.int64)
    tl.store(pages + part * num_rows + row, page, mask=is_row)
    if part == 0:
        tl.store(offsets + row, position & (PAGE - 1), mask=is_row)


@triton.jit
def _insert(tokens, sources, drafts, out, num_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < num_rows
    source = tl.load(sources + row, mask=is_row, other=-1)
    token = tl.load(tokens + row, mask=is_row, other=0)
    draft = tl.load(drafts + source, mask=source >= 0, other=0)
    tl.store(out + row, tl.where(source >= 0, draft, token), mask=is_row)


@triton.jit
def _advance(
    rows, seats, max_lengths, counts, firsts, tokens, decided, new, results, num_sequences, num_decided, num_drafts,
    L: tl.constexpr, COLUMNS: tl.constexpr, FIRST_TOKEN: tl.constexpr, RING: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    row = rows + tl.load(seats + b) * COLUMNS
    length, first = tl.load(row + _LENGTH), tl.load(firsts + b)
    drafts = tl.load(counts + b).to(tl.int64) - 1
    step = tl.arange(0, BLOCK_L)
    is_step = step < L
    token = tl.load(decided + tl.minimum(first + step, num_decided - 1), mask=is_step, other=0)
    is_draft = (step < drafts) & (step < L - 1)
    is_right = (tl.load(tokens + (step + 1) * num_sequences + b, mask=is_draft, other=0) == token) & is_draft
    accepted = tl.min(tl.where(is_right, L - 1, step), axis=0).to(tl.int64)
    own = results + b * (L + 2)
    tl.store(own, drafts)
    tl.store(own + 1, accepted)
    tl.store(own + 2 + step, token, mask=is_step)
    column = tl.arange(0, BLOCK_M).to(tl.int64)
    is_column = column < COLUMNS
    number = tl.load(row + column, mask=is_column, other=0)
    grown = tl.minimum(length + 1 + accepted, tl.load(max_lengths + b))
    number = tl.where(column == _LENGTH, grown, number)
    number = tl.where(column == _STATES_START, tl.maximum(number, length - 1 - num_drafts), number)
    head = column - _HEADS
    has_drafted = (head >= 0) & (head < L - 1) & (head < drafts)
    number = tl.where(has_drafted, tl.maximum(length - 1 - head, 0), number)
    later = (column - FIRST_TOKEN - length) & (RING - 1)
    is_new = (column >= FIRST_TOKEN) & is_column & (later < L)
    fresh = tl.load(decided + tl.minimum(first + later, num_decided - 1), mask=is_new, other=0)
    number = tl.where(is_new, tl.maximum(fresh, 0), number)
    tl.store(new + b * COLUMNS + column, number, mask=is_column)
