"""Sliding-window attention in blocks of queries: time and memory are linear in length (paper section 2.2).

A pack of whole documents is one stream of tiles, independent of document boundaries. A tile holds B consecutive queries
and the `past` + B keys that end with its last query, where `past` = window - 1. Every tile has the same band: query b
sees columns b to b + past, and its own key is column b + past. With B = 4 and a window of 3 (x seen, . masked):

    column     0 1 2 3 4 5   6
    query 0    x x x . . .   sink
    query 1    . x x x . .   sink
    query 2    . . x x x .   sink
    query 3    . . . x x x   sink

A second mask hides keys of the document before. The next tile starts B keys later, so neighboring tiles share `past`
keys. Tiles are computed in segments, so that the logits of a segment fit in the processor's cache.

Shapes as in `_tiles`; T queries; P keys of a stream: `past` before the first query, then those of whole tiles.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from openmimo.kernels.attention import CAUSAL_ONLY, AttentionNeed, AttentionOut
from openmimo.kernels.attention._calls import refuse_blocks
from openmimo.kernels.attention._tiles import (
    logits_gradient,
    pack_rows,
    scaled_product,
    sink_gradient,
    unpack_rows,
    wide_dtype,
    write_sink,
)
from openmimo.kernels.dispatch import Backend
from openmimo.runtime.device import uploaded

SEGMENT_LOGITS_CPU = 1 << 19
SEGMENT_LOGITS_ACCELERATOR = 1 << 25
MAX_WINDOW_CPU = 256
COLUMNS_MULTIPLE = 32
MIN_BLOCK = 24  # queries
MIN_ROWS = 128  # queries x query heads of a key/value head


def run(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    need: AttentionNeed,
    scale: float,
) -> AttentionOut:
    """Implement `openmimo.kernels.attention.attend`."""
    bands = _Bands.for_need(need, scale)
    if need.is_self_attention:
        starts_T = _starts(need.query_lengths, q_TNK.device)
        return AttentionOut(_attend_stream(q_TNK, k_SGK, v_SGV, sink_N, starts_T, bands))
    outputs = []
    keys, values = k_SGK.split(need.key_lengths), v_SGV.split(need.key_lengths)
    for q, k, v in zip(q_TNK.split(need.query_lengths), keys, values, strict=True):
        unseen = max(0, len(k) - len(q) - bands.past)
        starts_T = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        outputs.append(_attend_stream(q, k[unseen:], v[unseen:], sink_N, starts_T, bands))
    return AttentionOut(torch.cat(outputs))


@functools.lru_cache(maxsize=4)  # all layers of a pass use the same lengths
@torch.inference_mode(False)  # a later pass may save the cached tensor for its backward
def _starts(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the index in the pack of the first token of each token's sequence, int64 [T]."""
    lengths_B = torch.tensor(lengths)
    return uploaded((lengths_B.cumsum(0) - lengths_B).repeat_interleave(lengths_B), torch.int64, device)


def refuse(need: AttentionNeed) -> str | None:
    """Refuse calls without a window, and wide windows on a CPU."""
    if reason := refuse_blocks(need):
        return reason
    if not need.causal:
        return CAUSAL_ONLY
    if need.window_keys is None:
        return "it computes sliding windows only"
    if need.on_cpu and _window_in_use(need) > MAX_WINDOW_CPU:
        return f"on a CPU the blocked backend is faster beyond a window of {MAX_WINDOW_CPU} keys"
    return None


def _window_in_use(need: AttentionNeed) -> int:
    """Return the window, or the longest sequence if that is shorter."""
    assert need.window_keys is not None, "refused before"
    return min(need.window_keys, max(need.key_lengths))


@dataclass(frozen=True)
class _Bands:
    """The tiling of a call.

    Attributes:
        past: Keys that a query sees before its own.
        block: Queries of a tile.
        columns: Columns of a tile: past + block keys, and the sink if there is one.
        tiles: Tiles of a segment.
        num_kv_heads: G.
        scale: Factor of the logits.
    """

    past: int
    block: int
    columns: int
    tiles: int
    num_kv_heads: int
    scale: float

    @classmethod
    def for_need(cls, need: AttentionNeed, scale: float) -> "_Bands":
        """Choose the tiling that computes `need`."""
        # A row costs past + block + sink logits and uses past + 1 of them, so small blocks waste least; but products
        # with few rows are slow. Start from the smallest block with MIN_ROWS rows per key/value head, round its columns
        # up to COLUMNS_MULTIPLE, and let the block grow until no column is padding.
        past, sink = _window_in_use(need) - 1, int(need.has_sink)
        min_block = max(MIN_BLOCK, MIN_ROWS * need.num_kv_heads // need.num_heads)
        columns = math.ceil((past + min_block + sink) / COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE
        block = columns - past - sink
        logits = SEGMENT_LOGITS_CPU if need.on_cpu else SEGMENT_LOGITS_ACCELERATOR
        tiles = max(1, logits // (need.num_heads * block * columns))
        return cls(past, block, columns, tiles, need.num_kv_heads, scale)

    @property
    def rows(self) -> dict[str, int]:
        """Keyword arguments of `pack_rows`, `unpack_rows`, `write_sink` and `sink_gradient`."""
        return {"block": self.block, "num_kv_heads": self.num_kv_heads}

    def segments(self, num_queries: int) -> Iterator[tuple[slice, int]]:
        """Yield the queries and the number of tiles of each segment; the last tile may be partly empty."""
        for start in range(0, num_queries, self.tiles * self.block):
            queries = slice(start, min(start + self.tiles * self.block, num_queries))
            yield queries, math.ceil((queries.stop - start) / self.block)


def _attend_stream(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    starts_T: torch.Tensor,
    bands: _Bands,
) -> torch.Tensor:
    """Compute attention of T queries to S keys, of which the last T are their own, from key `starts_T[t]` on."""
    # Pad or cut the keys (a negative padding cuts) so that exactly `past` precede the first query, and the last tile is
    # whole. Column 0 of the tile that starts at query t is then key t of the padded stream.
    before = bands.past - (len(k_SGK) - len(q_TNK))
    after = -len(q_TNK) % bands.block
    k_PGK, v_PGV = (F.pad(x, (0, 0, 0, 0, before, after)) for x in (k_SGK, v_SGV))
    first_T = starts_T + before
    return _Banded.apply(q_TNK, k_PGK, v_PGV, sink_N, first_T, bands)


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TNK: torch.Tensor,
        k_PGK: torch.Tensor,
        v_PGV: torch.Tensor,
        sink_N: torch.Tensor | None,
        first_T: torch.Tensor,
        bands: _Bands,
    ) -> torch.Tensor:
        ctx.save_for_backward(q_TNK, k_PGK, v_PGV, sink_N, first_T)
        ctx.bands = bands
        stream = _Stream(q_TNK, k_PGK, v_PGV, sink_N, first_T, bands)
        out_TNV = q_TNK.new_empty(*q_TNK.shape[:2], v_PGV.shape[2])
        for queries, num_tiles in bands.segments(len(q_TNK)):
            tiles = stream.tiles(queries, num_tiles)
            unpack_rows(torch.bmm(tiles.probabilities_LMC, tiles.v_LCV), out_TNV[queries], **bands.rows)
        return out_TNV

    @staticmethod
    def backward(ctx: Any, grad_TNV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_TNK, k_PGK, v_PGV, sink_N, first_T = ctx.saved_tensors
        bands = ctx.bands
        stream = _Stream(q_TNK, k_PGK, v_PGV, sink_N, first_T, bands)
        grad_q_TNK = torch.empty_like(q_TNK)
        grad_k, grad_v = _StreamSum(k_PGK, bands), _StreamSum(v_PGV, bands)
        grad_sink_N = None if sink_N is None else torch.zeros_like(sink_N, dtype=wide_dtype(sink_N.dtype))
        for queries, num_tiles in bands.segments(len(q_TNK)):
            tiles = stream.tiles(queries, num_tiles)
            grad_LMV = pack_rows(grad_TNV[queries], **bands.rows)
            grad_logits_LMC = logits_gradient(tiles.probabilities_LMC, tiles.v_LCV, grad_LMV)
            grad_q_LMK = scaled_product(grad_logits_LMC, tiles.k_LCK, bands.scale)
            unpack_rows(grad_q_LMK, grad_q_TNK[queries], **bands.rows)
            grad_k.add(scaled_product(grad_logits_LMC.transpose(1, 2), tiles.q_LMK, bands.scale), queries)
            grad_v.add(torch.bmm(tiles.probabilities_LMC.transpose(1, 2), grad_LMV), queries)
            if grad_sink_N is not None:
                grad_sink_N += sink_gradient(grad_logits_LMC, **bands.rows)
        if grad_sink_N is not None:
            grad_sink_N = grad_sink_N.to(sink_N.dtype)
        return grad_q_TNK, grad_k.total(), grad_v.total(), grad_sink_N, None, None


@dataclass(frozen=True)
class _Tiles:
    q_LMK: torch.Tensor
    k_LCK: torch.Tensor
    v_LCV: torch.Tensor
    probabilities_LMC: torch.Tensor


class _Stream:
    """Computes the tiles of a call, one segment at a time; the buffers of keys and values are reused."""

    def __init__(
        self,
        q_TNK: torch.Tensor,
        k_PGK: torch.Tensor,
        v_PGV: torch.Tensor,
        sink_N: torch.Tensor | None,
        first_T: torch.Tensor,
        bands: _Bands,
    ):
        self._q_TNK, self._k_PGK, self._v_PGV, self._sink_N, self._first_T = q_TNK, k_PGK, v_PGV, sink_N, first_T
        self._bands = bands
        self._column_C = torch.arange(bands.columns, device=q_TNK.device)
        distance_BC = self._column_C - torch.arange(bands.block, device=q_TNK.device)[:, None]
        outside_BC = (distance_BC < 0) | (distance_BC > bands.past)
        tiles_of_heads = min(bands.tiles, math.ceil(len(q_TNK) / bands.block)) * bands.num_kv_heads
        self._k_LCK = k_PGK.new_zeros(tiles_of_heads, bands.columns, k_PGK.shape[2])
        self._v_LCV = v_PGV.new_zeros(tiles_of_heads, bands.columns, v_PGV.shape[2])
        self._band_BC = q_TNK.new_zeros(outside_BC.shape).masked_fill_(outside_BC, -math.inf)

    def tiles(self, queries: slice, num_tiles: int) -> _Tiles:
        """Return inputs and probabilities of the tiles of one segment."""
        bands = self._bands
        keys = slice(queries.start, queries.start + num_tiles * bands.block + bands.past)
        q_LMK = pack_rows(self._q_TNK[queries], **bands.rows)
        k_LCK = self._gather(self._k_PGK[keys], self._k_LCK)
        v_LCV = self._gather(self._v_PGV[keys], self._v_LCV)
        logits_LMC = scaled_product(q_LMK, k_LCK.transpose(1, 2), bands.scale)
        logits_JXBC = logits_LMC.view(num_tiles, -1, bands.block, bands.columns)
        logits_JXBC += self._mask(queries, num_tiles)[:, None]
        if self._sink_N is not None:
            write_sink(logits_LMC, self._sink_N, **bands.rows)
        probabilities_LMC = torch.softmax(logits_LMC, dim=-1, out=logits_LMC)
        return _Tiles(q_LMK, k_LCK, v_LCV, probabilities_LMC)

    def _gather(self, x_PGX: torch.Tensor, columns_LCX: torch.Tensor) -> torch.Tensor:
        """Copy the keys or values of each tile into its columns; the sink's column stays zero."""
        bands = self._bands
        num_keys = bands.block + bands.past
        x_JGCX = x_PGX.unfold(0, num_keys, bands.block).transpose(2, 3)
        columns_LCX = columns_LCX[: x_JGCX.shape[0] * x_JGCX.shape[1]]
        columns_LCX.view(len(x_JGCX), -1, *columns_LCX.shape[1:])[:, :, :num_keys] = x_JGCX
        return columns_LCX

    def _mask(self, queries: slice, num_tiles: int) -> torch.Tensor:
        """Return the additive mask [J, B, C] in the dtype of q: 0 where a query sees a key, -inf elsewhere."""
        block = self._bands.block
        missing = num_tiles * block - (queries.stop - queries.start)
        first_JB = F.pad(self._first_T[queries], (0, missing)).view(num_tiles, block)
        tile_start_J1 = queries.start + block * torch.arange(num_tiles, device=first_JB.device)[:, None]
        # A document that starts inside the tile hides the columns before its start; one that starts earlier hides none.
        before_JBC = self._column_C < (first_JB - tile_start_J1)[:, :, None]
        return torch.where(before_JBC, -math.inf, self._band_BC)


class _StreamSum:
    """The gradient of keys or values: the sum over the tiles that share them."""

    def __init__(self, x_PGX: torch.Tensor, bands: _Bands):
        P, G, X = x_PGX.shape
        self._bands = bands
        self._like = x_PGX
        self._sum = x_PGX.new_zeros(P + bands.block, G, X, dtype=wide_dtype(x_PGX.dtype))

    def add(self, x_LCX: torch.Tensor, queries: slice) -> None:
        """Add the gradients [L, C, X] of a segment's tiles to the keys or values that their columns hold."""
        # Tiles overlap, because neighbors share `past` keys, so one add of all columns would lose sums. The same B
        # columns of all tiles never overlap: they are one contiguous run of the stream.
        #
        #     tile 0   [ 0 1 2 3 | 4 5 ]            B = 4, past = 2: first add columns 0-3 of all tiles,
        #     tile 1           [ 4 5 6 7 | 8 9 ]    then columns 4-5.
        block, num_keys = self._bands.block, self._bands.block + self._bands.past
        _, G, X = self._sum.shape
        x_JCGX = x_LCX.view(-1, G, *x_LCX.shape[1:]).transpose(1, 2)
        for column in range(0, num_keys, block):
            part_JBGX = x_JCGX[:, column : min(column + block, num_keys)]
            start = queries.start + column
            target_JBGX = self._sum[start : start + len(x_JCGX) * block].view(-1, block, G, X)
            target_JBGX[:, : part_JBGX.shape[1]] += part_JBGX

    def total(self) -> torch.Tensor:
        """Return the gradient, in the shape and dtype of the keys or values."""
        return self._sum[: len(self._like)].to(self._like.dtype)


PLUGIN = Backend(priority=40, run=run, refuse=refuse)
