"""Sorting of tokens by expert, and its inverse, shared by the backends that need contiguous rows per expert.

T tokens, D model dim, E experts, A active experts a token, M = T x A choices, P rows of the sorted buffer.
"""

from dataclasses import dataclass
from typing import Any

import torch

from openmimo.kernels.operations import count_experts


@dataclass(frozen=True)
class SortedTokens:
    """Rows of tokens sorted by expert.

    Attributes:
        rows_PD: Rows of the tokens. The rows of each expert are padded with zeros to a multiple.
        row_M: Row of each choice, int64.
        counts_E: Number of rows of each expert, including padding.
    """

    rows_PD: torch.Tensor
    row_M: torch.Tensor
    counts_E: torch.Tensor


def sort_by_expert(
    x_TD: torch.Tensor, expert_ids_TA: torch.Tensor, num_experts: int, *, multiple: int = 1
) -> SortedTokens:
    """Repeat each token once per chosen expert and sort these rows by expert. Differentiable in x.

    Args:
        x_TD: The tokens.
        expert_ids_TA: Chosen experts.
        num_experts: E.
        multiple: The number of rows of each expert is rounded up to a multiple of this.
    """
    ids_M = expert_ids_TA.flatten()
    chosen_E = count_experts(ids_M, num_experts)
    counts_E = (chosen_E + multiple - 1) // multiple * multiple
    order = torch.argsort(ids_M, stable=True)
    # Padding shifts the rows of each expert by the padding of all experts before it.
    added_E = (counts_E - chosen_E).cumsum(0) - (counts_E - chosen_E)
    row_M = torch.empty_like(ids_M)
    row_M[order] = torch.arange(len(ids_M), device=ids_M.device) + added_E[ids_M[order]]
    num_rows = len(ids_M) if multiple == 1 else int(counts_E.sum())
    rows_MD = x_TD[:, None].expand(-1, expert_ids_TA.shape[1], -1).flatten(0, 1)
    return SortedTokens(_Scatter.apply(rows_MD, row_M, num_rows), row_M, counts_E)


def combine(y_PD: torch.Tensor, row_M: torch.Tensor, weights_TA: torch.Tensor) -> torch.Tensor:
    """Sum each token's A rows by weight, in float32 or better, in the order of the tokens: [T, D] in the dtype of y."""
    y_TAD = _Take.apply(y_PD, row_M).unflatten(0, weights_TA.shape)
    wide = torch.promote_types(y_PD.dtype, torch.float32)
    return (y_TAD.to(wide) * weights_TA.to(wide)[..., None]).sum(dim=1).to(y_PD.dtype)


class _Scatter(torch.autograd.Function):
    """Copy row m to row `row_M[m]` of a zero buffer. The indices are distinct, so the backward pass is a gather."""

    @staticmethod
    def forward(ctx: Any, rows_MD: torch.Tensor, row_M: torch.Tensor, num_rows: int) -> torch.Tensor:
        ctx.save_for_backward(row_M)
        return rows_MD.new_zeros(num_rows, rows_MD.shape[1]).index_copy_(0, row_M, rows_MD)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (row_M,) = ctx.saved_tensors
        return gradient[row_M], None, None


class _Take(torch.autograd.Function):
    """The inverse of `_Scatter`. Its backward pass is a copy, where that of plain indexing accumulates."""

    @staticmethod
    def forward(ctx: Any, rows_PD: torch.Tensor, row_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row_M)
        ctx.num_rows = len(rows_PD)
        return rows_PD[row_M]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (row_M,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.num_rows, gradient.shape[1]).index_copy_(0, row_M, gradient), None
