"""Context parallelism: each rank has some tokens of every row, and fetches the keys that its queries see.

A micro-batch of T tokens is cut into 2 C chunks for C ranks. Rank r has chunks r and 2 C - 1 - r, so that in a long
document every rank has the same number of query-key pairs:

    chunk    0   1   2   3   4   5   6   7        C = 4
    rank     0   1   2   3   3   2   1   0

Before attention, a rank fetches the keys and values that its queries see and that it does not hold: in a sliding layer
the `window_keys - 1` before each chunk (the halo), in a full layer those from the start of each document. Labels, MTP
inputs and positions are computed before the cut, so that nothing else of a neighbor is needed.

A full layer may exchange heads instead: for attention, each rank has all tokens of some heads, in the order of the
micro-batch. `parallel.head_exchange` chooses.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from openmimo.kernels.attention import AttentionOut, attend
from openmimo.model.context import AttentionCall, PackedContext, RotaryTables, RouterLoss, RoutingTape, SeenKeys
from openmimo.model.heads import MicroBatch
from openmimo.parallel.exchange import FetchPlan, RankOrder, fetch_rows, plan_fetch, return_tokens, share_tokens
from openmimo.parallel.head_exchange import exchanges_heads, head_shares, union_length


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one document in one chunk.

    Attributes:
        start: First row in the micro-batch.
        stop: The row after the last.
        document_start: First row of the document.
    """

    start: int
    stop: int
    document_start: int

    def first_key(self, window_keys: int | None) -> int:
        """Return the first row that the first query of the segment sees."""
        return self.document_start if window_keys is None else max(self.document_start, self.start - window_keys + 1)


def segments_of(document_lengths: tuple[int, ...], rank: int, num_ranks: int) -> list[Segment]:
    """Return the tokens of one rank, in the order in which it holds them."""
    T = sum(document_lengths)
    chunks = [(number * T // (2 * num_ranks), (number + 1) * T // (2 * num_ranks)) for number in range(2 * num_ranks)]
    segments = []
    for first, last in (chunks[rank], chunks[2 * num_ranks - 1 - rank]):
        start = 0
        for length in document_lengths:
            begin, end = max(first, start), min(last, start + length)
            if begin < end:
                segments.append(Segment(begin, end, start))
            start += length
    return segments


def fetched_rows(by_rank: list[list[Segment]]) -> float:
    """Return the rows that a rank fetches for a full layer, mean over ranks, given the segments of all."""
    needed = [
        union_length((segment.document_start, segment.stop) for segment in segments) - _num_tokens(segments)
        for segments in by_rank
    ]
    return sum(needed) / len(needed)


class ContextSplit:
    """The cut of one micro-batch over the ranks of a group.

    Args:
        document_lengths: Tokens of each document of the whole micro-batch.
        group: The ranks that share it.
        device: Device of the tokens.

    Attributes:
        document_lengths: As above.
        group: As above.
        device: As above.
        rank: This rank in the group.
    """

    def __init__(self, document_lengths: tuple[int, ...], group: dist.ProcessGroup, device: torch.device):
        self.document_lengths, self.group, self.device = document_lengths, group, device
        self.rank = dist.get_rank(group)
        self._by_rank = [
            segments_of(document_lengths, rank, dist.get_world_size(group))
            for rank in range(dist.get_world_size(group))
        ]
        self._held = [_rows((segment.start, segment.stop) for segment in segments) for segments in self._by_rank]
        self._plans: dict[int | None, FetchPlan] = {}

    @property
    def segments(self) -> list[Segment]:
        """The tokens of this rank."""
        return self._by_rank[self.rank]

    @property
    def rows(self) -> torch.Tensor:
        """The rows of this rank in the whole micro-batch, int64 [T], on the CPU."""
        return self._held[self.rank]

    def batch(self, whole: MicroBatch) -> MicroBatch:
        """Return the part of a micro-batch that this rank has."""
        rows_T = self.rows.to(whole.tokens_T.device)
        return MicroBatch(
            whole.tokens_T[rows_T],
            tuple(segment.stop - segment.start for segment in self.segments),
            tuple(labels_T[rows_T] for labels_T in whole.labels),
            tuple(tokens_T[rows_T] for tokens_T in whole.shifted),
        )

    def plan(self, window_keys: int | None) -> FetchPlan:
        """Return the plan by which this rank fetches the keys of a layer."""
        if window_keys not in self._plans:
            needed = [
                _rows((segment.first_key(window_keys), segment.stop) for segment in segments)
                for segments in self._by_rank
            ]
            self._plans[window_keys] = plan_fetch(self.rank, self._held, needed, self.device)
        return self._plans[window_keys]

    @property
    def num_ranks(self) -> int:
        """Ranks that share the micro-batch."""
        return len(self._held)

    @functools.cached_property
    def order(self) -> RankOrder:
        """The order of the tokens by rank."""
        rows = torch.cat(self._held)
        places = torch.empty_like(rows)
        places[rows] = torch.arange(len(rows))
        counts = [len(held) for held in self._held]
        return RankOrder(rows.to(self.device), places.to(self.device), counts, self.rank)

    @functools.cached_property
    def fetched_rows(self) -> float:
        """Rows that a rank fetches for a full layer, mean over ranks."""
        return fetched_rows(self._by_rank)

    def shares(self, exchange: str, num_heads: int, num_kv_heads: int) -> tuple[int, int] | None:
        """Return the query and key/value heads of a rank if a full layer exchanges heads, otherwise None."""
        by_heads = exchanges_heads(
            exchange,
            num_heads,
            num_kv_heads,
            num_ranks=self.num_ranks,
            num_tokens=sum(self.document_lengths),
            fetched_rows=self.fetched_rows,
        )
        return head_shares(num_heads, num_kv_heads, self.num_ranks) if by_heads else None


class ShardedContext(PackedContext):
    """The tokens that one rank has of packed documents.

    Args:
        split: The cut of the micro-batch.
        routing: Recording and replay of experts (None: neither).
        balance_weight: As in `PackedContext`.
        balance_length: As in `PackedContext`; required with a balance weight.
        z_weight: As in `PackedContext`.
        sum_over_ranks: Sums a tensor over the ranks that share the micro-batch.
        exchange: What full layers exchange; see `parallel.head_exchange`.
    """

    def __init__(
        self,
        split: ContextSplit,
        *,
        routing: RoutingTape | None = None,
        balance_weight: float = 0.0,
        balance_length: int | None = None,
        z_weight: float = 0.0,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
        exchange: str = "auto",
    ):
        lengths = tuple(segment.stop - segment.start for segment in split.segments)
        super().__init__(lengths, device=split.device, routing=routing)
        offsets = [segment.start - segment.document_start for segment in split.segments]
        self.positions_T += torch.repeat_interleave(torch.tensor(offsets), torch.tensor(lengths)).to(split.device)
        self._rotary = RotaryTables(self.positions_T)
        self._split, self._exchange = split, exchange
        if balance_weight > 0.0 or z_weight > 0.0:
            assert balance_length is not None, "rows are cut, so a document is no sequence"
            rows_T = split.rows // balance_length
            num_rows = 1 + max(int(rows[-1]) for rows in split._held if len(rows)) // balance_length
            self.router_loss = RouterLoss(
                balance_weight, rows_T.to(split.device), num_rows, sum_over_ranks, z_weight=z_weight
            )

    def attend(self, call: AttentionCall) -> AttentionOut:
        """As `AttentionContext.attend`."""
        is_shared = call.is_source or call.source_layer is not None or call.score_block is not None
        if is_shared or call.window_keys is not None or call.blocks is not None:
            return super().attend(call)
        q_TNK, k_TGK, v_TGV = call.heads()
        assert k_TGK is not None and v_TGV is not None
        shares = self._split.shares(self._exchange, q_TNK.shape[1], k_TGK.shape[1])
        if shares is None:
            return super().attend(call)
        return AttentionOut(self._attend_to_heads(q_TNK, k_TGK, v_TGV, call.sink_N, shares))

    def _attend_to_heads(
        self,
        q_TNK: torch.Tensor,
        k_TGK: torch.Tensor,
        v_TGV: torch.Tensor,
        sink_N: torch.Tensor | None,
        shares: tuple[int, int],
    ) -> torch.Tensor:
        """Compute attention of all tokens to a share of the heads, and return the outputs of this rank's tokens."""
        split = self._split
        (T, N, K), V, (heads, kv_heads) = q_TNK.shape, v_TGV.shape[-1], shares
        joined_TCJ = torch.cat([_by_rank(tensor, split.num_ranks) for tensor in (q_TNK, k_TGK, v_TGV)], dim=2)
        q, k, v = share_tokens(joined_TCJ, split.order, split.group).split_with_sizes(
            [heads * K, kv_heads * K, kv_heads * V], dim=1
        )
        result = attend(
            q.reshape(-1, heads, K),
            k.reshape(-1, kv_heads, K),
            v.reshape(-1, kv_heads, V),
            None if sink_N is None else sink_N[split.rank * heads : (split.rank + 1) * heads],
            query_lengths=split.document_lengths,
            key_lengths=split.document_lengths,
            window_keys=None,
        )
        return return_tokens(result.out_TNV.flatten(1), split.order, split.group).reshape(T, N, V)

    def _seen(self, k_TGK: torch.Tensor, v_TGV: torch.Tensor, window_keys: int | None) -> SeenKeys:
        T, G, K = k_TGK.shape
        joined = torch.cat([k_TGK, v_TGV], dim=-1).reshape(T, -1)
        fetched = fetch_rows(joined, self._split.plan(window_keys), self._split.group).view(-1, G, K + v_TGV.shape[-1])
        lengths = tuple(segment.stop - segment.first_key(window_keys) for segment in self._split.segments)
        return SeenKeys(fetched[..., :K], fetched[..., K:], lengths)


def _num_tokens(segments: list[Segment]) -> int:
    return sum(segment.stop - segment.start for segment in segments)


def _by_rank(x_THD: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Return the heads of each rank [T, C, J], where several ranks have the same head if there are fewer than ranks."""
    T, H, D = x_THD.shape
    if num_ranks > H:
        x_THD = x_THD.repeat_interleave(num_ranks // H, dim=1)
    return x_THD.reshape(T, num_ranks, max(H // num_ranks, 1) * D)


def _rows(ranges: Iterable[tuple[int, int]]) -> torch.Tensor:
    parts = [torch.arange(start, stop) for start, stop in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
