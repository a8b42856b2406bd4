"""Drafting on an accelerator: one kernel for each function, where torch needs up to a hundred."""

import torch

from openmimo.kernels.dispatch import Backend, triton_unavailable
from openmimo.kernels.operations import DraftingFunctions, DraftingNeed, DraftingRows, DraftingSizes


def plan(
    rows_XM: torch.Tensor,
    seats_B: torch.Tensor,
    limits_B: torch.Tensor,
    max_lengths_B: torch.Tensor,
    sizes: DraftingSizes,
) -> DraftingRows:
    """Implement `openmimo.kernels.operations.plan_drafting`."""
    from openmimo.kernels.drafting._triton import plan_rows

    return plan_rows(rows_XM, seats_B, limits_B, max_lengths_B, sizes)


def slots(
    tables_pBY: torch.Tensor, rows: DraftingRows, whole_from_B: torch.Tensor, page_positions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `openmimo.kernels.operations.drafting_slots`."""
    from openmimo.kernels.drafting._triton import find_slots

    return find_slots(tables_pBY, rows, whole_from_B, page_positions)


def insert(token_T: torch.Tensor, source_T: torch.Tensor, tokens_LB: torch.Tensor) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.insert_drafts`."""
    from openmimo.kernels.drafting._triton import insert_tokens

    return insert_tokens(token_T, source_T, tokens_LB)


def advance(
    rows_XM: torch.Tensor,
    seats_B: torch.Tensor,
    max_lengths_B: torch.Tensor,
    rows: DraftingRows,
    decided_T: torch.Tensor,
    sizes: DraftingSizes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implement `openmimo.kernels.operations.advance_texts`."""
    from openmimo.kernels.drafting._triton import advance_rows

    return advance_rows(rows_XM, seats_B, max_lengths_B, rows, decided_T, sizes)


def refuse(need: DraftingNeed) -> str | None:
    """Integers on an accelerator."""
    return triton_unavailable(need.on_cpu, torch.float32)


PLUGIN = Backend(priority=80, run=DraftingFunctions(plan, slots, insert, advance), refuse=refuse)
