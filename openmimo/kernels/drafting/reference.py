"""The definition, in operations of torch.

B sequences, H heads, L = H + 1, T rows of a pass, Q rows of all passes; see `openmimo.kernels.operations`.
"""

import torch

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import (
    MIX_ADDEND,
    MIX_LAST_SHIFT,
    MIX_ROUNDS,
    ROW_HEADS,
    ROW_KEY,
    ROW_LENGTH,
    ROW_STATES_START,
    UNIFORM_BITS,
    DraftingFunctions,
    DraftingRows,
    DraftingSizes,
    signed,
)


def plan(
    rows_XM: torch.Tensor,
    seats_B: torch.Tensor,
    limits_B: torch.Tensor,
    max_lengths_B: torch.Tensor,
    sizes: DraftingSizes,
) -> DraftingRows:
    """Implement `openmimo.kernels.operations.plan_drafting`."""
    rows_BM, H, B, device = rows_XM[seats_B], sizes.num_heads, len(seats_B), rows_XM.device
    length_B = rows_BM[:, ROW_LENGTH]
    starts_HB = torch.maximum(rows_BM[:, ROW_HEADS : ROW_HEADS + H], rows_BM[:, ROW_STATES_START, None]).T
    drafts_B = torch.minimum(limits_B, (max_lengths_B - 1 - length_B).clamp(min=0))
    if H:
        drafts_B = torch.where(starts_HB[0] < length_B - 1, drafts_B, drafts_B.clamp(max=0))
    heads_H1 = torch.arange(H, device=device)[:, None]
    starts_LB = torch.cat([starts_HB, length_B[None] - 1])
    head_counts_HB = torch.where(heads_H1 < drafts_B, length_B - 1 - starts_HB, 0)
    counts_LB = torch.cat([head_counts_HB, drafts_B[None] + 1])
    keys_LB = torch.where(counts_LB > 0, starts_LB + counts_LB, 0)
    first_LB = counts_LB.cumsum(dim=1) - counts_LB
    parts = []
    for number, num_rows in enumerate([sizes.head_rows] * H + [sizes.main_rows]):
        sequence_T, position_T, is_row_T = _packed(counts_LB[number], starts_LB[number], num_rows)
        length_T, is_main = length_B[sequence_T], number == H
        index_T = position_T + (0 if is_main else number + 1)
        later_T = index_T - length_T + 1  # 0 for the newest token, and a draft above
        source_T = later_T.clamp(min=0, max=H) * B + sequence_T
        has_source_T, other_T = (is_row_T, sequence_T) if is_main else (later_T > 0, -1)
        source_T = torch.where(has_source_T, source_T, other_T)
        parts.append((sequence_T, position_T, is_row_T, index_T, source_T))
    sequence_Q, position_Q, is_row_Q, index_Q, source_Q = map(torch.cat, zip(*parts, strict=True))
    R, seat_Q = sizes.ring_positions, seats_B[sequence_Q]
    newest_B = rows_BM.gather(1, sizes.first_token + (length_B[:, None] - 1) % R)[:, 0]
    return DraftingRows(
        counts_LB.int(),
        keys_LB.int(),
        first_LB,
        (first_LB + counts_LB - 1).clamp(min=0),
        sequence_Q,
        position_Q,
        is_row_Q,
        torch.where(is_row_Q, seat_Q * R + position_Q % R, sizes.spare_place),
        rows_BM[sequence_Q, sizes.first_token + index_Q % R],
        source_Q,
        random_numbers(rows_BM[:, ROW_KEY][sequence_Q], position_Q + 1),
        seat_Q,
        torch.cat([newest_B[None], newest_B.new_zeros(H, B)]),
    )


def _packed(
    counts_B: torch.Tensor, starts_B: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequence and position of each row of a pass, and whether it is none of the surplus rows."""
    ends_B = counts_B.cumsum(dim=0)
    row_T = torch.arange(num_rows, device=counts_B.device)
    sequence_T = torch.searchsorted(ends_B, row_T, right=True).clamp(max=len(counts_B) - 1)
    is_row_T = row_T < ends_B[-1]
    position_T = torch.where(is_row_T, row_T + (starts_B - ends_B + counts_B)[sequence_T], 0)
    return sequence_T, position_T, is_row_T


def random_numbers(keys_Q: torch.Tensor, positions_Q: torch.Tensor) -> torch.Tensor:
    """Return a number in [0, 1) for each key and position, float64. Products of int64 wrap around."""
    mixed_Q = (keys_Q ^ positions_Q) + signed(MIX_ADDEND)
    for shift, factor in MIX_ROUNDS:
        mixed_Q = (mixed_Q ^ _right(mixed_Q, shift)) * signed(factor)
    mixed_Q = mixed_Q ^ _right(mixed_Q, MIX_LAST_SHIFT)
    return _right(mixed_Q, 64 - UNIFORM_BITS).double() / (1 << UNIFORM_BITS)


def _right(values: torch.Tensor, count: int) -> torch.Tensor:
    """Bits of int64 moved to the right, with zeros on the left."""
    return (values >> count) & ((1 << (64 - count)) - 1)


def slots(
    tables_pBY: torch.Tensor, rows: DraftingRows, whole_from_B: torch.Tensor, page_positions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `openmimo.kernels.operations.drafting_slots`."""
    has_page_Q = rows.is_row_Q & (rows.position_Q >= whole_from_B[rows.sequence_Q])
    page_pQ = tables_pBY[:, rows.sequence_Q, rows.position_Q // page_positions].long()
    return torch.where(has_page_Q, page_pQ, -1), rows.position_Q % page_positions


def insert(token_T: torch.Tensor, source_T: torch.Tensor, tokens_LB: torch.Tensor) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.insert_drafts`."""
    return torch.where(source_T < 0, token_T, tokens_LB.view(-1)[source_T.clamp(min=0)])


def advance(
    rows_XM: torch.Tensor,
    seats_B: torch.Tensor,
    max_lengths_B: torch.Tensor,
    rows: DraftingRows,
    decided_T: torch.Tensor,
    sizes: DraftingSizes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `openmimo.kernels.operations.advance_texts`."""
    rows_BM, H, device = rows_XM[seats_B], sizes.num_heads, rows_XM.device
    length_B1, drafts_B1 = rows_BM[:, ROW_LENGTH, None], rows.counts_LB[-1, :, None].long() - 1
    heads_H, places_L = torch.arange(H, device=device), torch.arange(H + 1, device=device)
    decided_BL = decided_T[(rows.first_LB[-1, :, None] + places_L).clamp(max=len(decided_T) - 1)]
    is_right_BH = (decided_BL[:, :H] == rows.tokens_LB[1:].T) & (heads_H < drafts_B1)
    accepted_B1 = is_right_BH.long().cumprod(dim=1).sum(dim=1, keepdim=True)
    new_BM, heads = rows_BM.clone(), slice(ROW_HEADS, ROW_HEADS + H)
    new_BM[:, ROW_LENGTH] = torch.minimum((length_B1 + 1 + accepted_B1)[:, 0], max_lengths_B)
    new_BM[:, ROW_STATES_START] = torch.maximum(rows_BM[:, ROW_STATES_START], length_B1[:, 0] - 1 - sizes.num_drafts)
    new_BM[:, heads] = torch.where(heads_H < drafts_B1, (length_B1 - 1 - heads_H).clamp(min=0), rows_BM[:, heads])
    new_BM.scatter_(1, sizes.first_token + (length_B1 + places_L) % sizes.ring_positions, decided_BL.clamp(min=0))
    return new_BM, torch.cat([drafts_B1, accepted_B1, decided_BL], dim=1)


PLUGIN = Backend(priority=0, run=DraftingFunctions(plan, slots, insert, advance), refuse=lambda need: None)
