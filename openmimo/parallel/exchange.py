"""Rows of a tensor that is split over ranks, fetched from the ranks that hold them. Differentiable.

A rank states the rows that it needs of every rank; only rows that it does not hold travel, in one all-to-all. The
gradient of a row travels back to its holder, which adds up those of all readers. The halo of a sliding window and the
keys of a full layer differ only in the rows that they name.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class FetchPlan:
    """The rows that one rank sends and receives, and their order in the result.

    Attributes:
        sent_S: Local rows to send, int64, grouped by destination.
        sent_counts: Rows for each rank.
        received_counts: Rows from each rank.
        layout_R: For each row of the result, its place among the local rows followed by the received ones, int64.
    """

    sent_S: torch.Tensor
    sent_counts: list[int]
    received_counts: list[int]
    layout_R: torch.Tensor

    @property
    def num_received(self) -> int:
        """Rows that travel to this rank."""
        return sum(self.received_counts)


def plan_fetch(rank: int, held: list[torch.Tensor], needed: list[torch.Tensor], device: torch.device) -> FetchPlan:
    """Plan a fetch. Every rank makes the same lists.

    Args:
        rank: This rank.
        held: Global row numbers that each rank holds, int64, in its local order.
        needed: Global row numbers that each rank needs, in the order of its result; rows may repeat.
        device: Device of the tensors.
    """
    num_rows = sum(len(rows) for rows in held)
    owner, local = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, dtype=torch.int64)
    for holder, rows in enumerate(held):
        owner[rows] = holder
        local[rows] = torch.arange(len(rows))
    sent, place = [], torch.empty(num_rows, dtype=torch.int64)
    for reader, rows in enumerate(needed):
        unique = torch.unique(rows)
        sent.append(local[unique[owner[unique] == rank]] if reader != rank else local[:0])
        if reader == rank:
            travels = unique[owner[unique] != rank]
            by_holder = travels[torch.argsort(owner[travels], stable=True)]
            received_counts = torch.bincount(owner[by_holder], minlength=len(held)).tolist()
            place[held[rank]] = torch.arange(len(held[rank]))
            place[by_holder] = len(held[rank]) + torch.arange(len(by_holder))
    return FetchPlan(
        torch.cat(sent).to(device), [len(rows) for rows in sent], received_counts, place[needed[rank]].to(device)
    )


def fetch_rows(x: torch.Tensor, plan: FetchPlan, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the needed rows [R, ...] of a tensor whose local rows are x [T, ...]. All ranks of the group call it."""
    received = all_to_all(x.index_select(0, plan.sent_S), plan.sent_counts, plan.received_counts, group)
    return torch.cat([x, received]).index_select(0, plan.layout_R)


@dataclass(frozen=True)
class RankOrder:
    """The tokens of a micro-batch in the order of the ranks that hold them.

    Attributes:
        rows_W: The row of each token in the micro-batch, int64, in the order of ranks.
        places_W: The inverse: the place of each row of the micro-batch.
        counts: Tokens of each rank.
        rank: This rank.
    """

    rows_W: torch.Tensor
    places_W: torch.Tensor
    counts: list[int]
    rank: int


def share_tokens(x_TCJ: torch.Tensor, order: RankOrder, group: dist.ProcessGroup) -> torch.Tensor:
    """Send x[:, r] to each rank r. Returns what this rank has of all tokens [W, J], in the order of the micro-batch."""
    T, C, J = x_TCJ.shape
    sent = x_TCJ.transpose(0, 1).reshape(C * T, J)
    return all_to_all(sent, [T] * C, order.counts, group).index_select(0, order.places_W)


def return_tokens(x_WJ: torch.Tensor, order: RankOrder, group: dist.ProcessGroup) -> torch.Tensor:
    """Send each token back to its rank: the inverse of `share_tokens`. Returns [T, C, J] by the rank that sent it."""
    T, C = order.counts[order.rank], len(order.counts)
    received = all_to_all(x_WJ.index_select(0, order.rows_W), order.counts, [T] * C, group)
    return received.view(C, T, x_WJ.shape[1]).transpose(0, 1)


def all_to_all(
    x: torch.Tensor, sent_counts: list[int], received_counts: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Send consecutive rows of x to each rank, and return the rows received, in the order of ranks. Differentiable."""
    return _AllToAll.apply(x, sent_counts, received_counts, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, sent_counts: list[int], received_counts: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.counts, ctx.group = (sent_counts, received_counts), group
        return _exchange(x, sent_counts, received_counts, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        sent_counts, received_counts = ctx.counts
        return _exchange(gradient, received_counts, sent_counts, ctx.group), None, None, None


def _exchange(
    x: torch.Tensor, sent_counts: list[int], received_counts: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    received = x.new_empty(sum(received_counts), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), received_counts, sent_counts, group=group)
    return received
