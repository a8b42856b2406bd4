"""Tokens sorted by expert, and back: what the sorted backends share.

T tokens, D model dim, E experts, A active experts a token, M = T x A choices, P rows of the sorted buffer.
"""

from dataclasses import dataclass
from typing import Any

import torch

from openmimo.kernels.operations import count_experts


@dataclass(frozen=True)
class SortedTokens:
    """rows_PD: the tokens' rows, by expert, each expert's padded with zeros to a multiple. place_M: the row of each
    choice. counts_E: rows of each expert, padding included.
    """

    rows_PD: torch.Tensor
    place_M: torch.Tensor
    counts_E: torch.Tensor


def sort_by_expert(
    x_TD: torch.Tensor, expert_ids_TA: torch.Tensor, num_experts: int, *, multiple: int = 1
) -> SortedTokens:
    """Repeats each token once for each of its experts and sorts these rows by expert; differentiable in x."""
    ids_M = expert_ids_TA.flatten()
    chosen_E = count_experts(ids_M, num_experts)
    counts_E = (chosen_E + multiple - 1) // multiple * multiple
    order = torch.argsort(ids_M, stable=True)
    # The sorted choices stand one after another; padding moves each expert's by what was added before it.
    added_E = (counts_E - chosen_E).cumsum(0) - (counts_E - chosen_E)
    place_M = torch.empty_like(ids_M)
    place_M[order] = torch.arange(len(ids_M), device=ids_M.device) + added_E[ids_M[order]]
    num_rows = len(ids_M) if multiple == 1 else int(counts_E.sum())
    rows_MD = x_TD[:, None].expand(-1, expert_ids_TA.shape[1], -1).flatten(0, 1)
    return SortedTokens(_Scatter.apply(rows_MD, place_M, num_rows), place_M, counts_E)


def combine(y_PD: torch.Tensor, place_M: torch.Tensor, weights_TA: torch.Tensor) -> torch.Tensor:
    """Undoes the sorting and sums each token's A rows by weight, in float32 or better: [T, D] in the dtype of y."""
    y_TAD = _Take.apply(y_PD, place_M).unflatten(0, weights_TA.shape)
    wide = torch.promote_types(y_PD.dtype, torch.float32)
    return (y_TAD.to(wide) * weights_TA.to(wide)[..., None]).sum(dim=1).to(y_PD.dtype)


class _Scatter(torch.autograd.Function):
    """Row m to row `place_M[m]` of a zero buffer. Places differ, so the gradient is a plain read."""

    @staticmethod
    def forward(ctx: Any, rows_MD: torch.Tensor, place_M: torch.Tensor, num_rows: int) -> torch.Tensor:
        ctx.save_for_backward(place_M)
        return rows_MD.new_zeros(num_rows, rows_MD.shape[1]).index_copy_(0, place_M, rows_MD)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (place_M,) = ctx.saved_tensors
        return gradient[place_M], None, None


class _Take(torch.autograd.Function):
    """The inverse of `_Scatter`; its gradient is `_Scatter`, not the accumulation that plain indexing would do."""

    @staticmethod
    def forward(ctx: Any, rows_PD: torch.Tensor, place_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_M)
        ctx.num_rows = len(rows_PD)
        return rows_PD[place_M]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (place_M,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.num_rows, gradient.shape[1]).index_copy_(0, place_M, gradient), None
