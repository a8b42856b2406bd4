"""Causal attention in blocks of queries, each against the keys that any of them may see: never T x T memory.

A tile is a block of consecutive queries of the pack, and the run of keys from the first that its first query sees to
the own key of its last query. First and last visible keys never decrease along a pack, so all queries of the tile see
the middle of the run, and only its ends need a mask (x seen, . masked, p padding, which is masked as well):

               left    middle     right
    query 0    x x x | x x x x | . . . p
    query 1    . x x | x x x x | x . . p
    query 2    . . x | x x x x | x x . p
    query 3    . . . | x x x x | x x x p

Where queries read chosen blocks only, the tile is the same, and one more mask hides the other blocks. Block scores are
maxima over the blocks of a tile's probabilities, and have no gradient.

A long sequence ends its tile; short sequences share one. Both sizes of a tile are rounded up, with zero queries that
are dropped from the output and with masked keys.

Shapes as in `_tiles`, where L is G: one tile at a time. T queries, S keys, X blocks of keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from openmimo.kernels.attention import CAUSAL_ONLY, NO_SCORES, AttentionNeed, AttentionOut, ChosenBlocks
from openmimo.kernels.attention._tiles import (
    COLUMNS_MULTIPLE,
    chosen_mask,
    logits_gradient,
    pack_rows,
    scaled_product,
    sink_gradient,
    unpack_rows,
    whole_columns,
    wide_dtype,
    write_sink,
)
from openmimo.kernels.dispatch import Backend

TILE_LOGITS_CPU = 1 << 22
TILE_LOGITS_ACCELERATOR = 1 << 27
BLOCK_MULTIPLE = 16
MAX_BLOCK_CPU = 128
MAX_BLOCK_ACCELERATOR = 1024


def run(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    need: AttentionNeed,
    scale: float,
    blocks: ChosenBlocks | None = None,
) -> AttentionOut:
    """Implement `openmimo.kernels.attention.attend`."""
    k_GSK, v_GSV = (F.pad(x.transpose(0, 1), (0, 0, 0, COLUMNS_MULTIPLE)) for x in (k_SGK, v_SGV))
    scores_TGC = None
    if need.score_block is not None:
        num_blocks = -(-max(need.key_lengths) // need.score_block)
        dtype = wide_dtype(q_TNK.dtype)
        scores_TGC = torch.zeros(len(q_TNK), need.num_kv_heads, num_blocks, dtype=dtype, device=q_TNK.device)
    out_TNV = _Blocked.apply(q_TNK, k_GSK, v_GSV, sink_N, _plan(need), scale, blocks, scores_TGC, need.score_block)
    return AttentionOut(out_TNV, scores_TGC)


@dataclass(frozen=True)
class _Tile:
    """One block of queries and its run of keys.

    Attributes:
        queries: Rows of the pack.
        block: B, the number of queries after rounding up.
        keys: The run of keys, padding included.
        first_B: Column of the first key that each query sees.
        last_B: Column of the last key that each query sees: its own.
        left: Columns that some query does not see because they are before its first key.
        right: Columns that some query does not see because they are after its last key.
    """

    queries: slice
    block: int
    keys: slice
    first_B: torch.Tensor
    last_B: torch.Tensor
    left: slice
    right: slice


def _plan(need: AttentionNeed) -> list[_Tile]:
    """Return the tiles of a call."""
    query_lengths, key_lengths = torch.tensor(need.query_lengths), torch.tensor(need.key_lengths)
    key_ends_T = key_lengths.cumsum(0).repeat_interleave(query_lengths)
    query_ends_T = query_lengths.cumsum(0).repeat_interleave(query_lengths)
    last_T = key_ends_T - query_ends_T + torch.arange(len(key_ends_T))
    first_T = key_ends_T - key_lengths.repeat_interleave(query_lengths)
    if need.window_keys is not None:
        first_T = torch.maximum(first_T, last_T - need.window_keys + 1)
    last, first, query_ends = last_T.tolist(), first_T.tolist(), query_ends_T.tolist()
    sink = int(need.has_sink)
    tile_logits = TILE_LOGITS_CPU if need.on_cpu else TILE_LOGITS_ACCELERATOR
    max_block = MAX_BLOCK_CPU if need.on_cpu else MAX_BLOCK_ACCELERATOR
    tiles, start = [], 0
    while start < len(last):
        # `span` keys of the first query set the price of a row: take as many queries as TILE_LOGITS pays for. A tile
        # whose span is longer than its block ends with its sequence, because every query of the next one would pay for
        # the whole span. Short sequences share the tile.
        span = last[start] + 1 - first[start]
        affordable = tile_logits // (need.num_heads * span) // BLOCK_MULTIPLE * BLOCK_MULTIPLE
        block = min(max_block, max(BLOCK_MULTIPLE, affordable))
        stop = min(start + block, query_ends[start] if span > block else len(last))
        low = first[start]
        num_keys = whole_columns(last[stop - 1] + 1 - low + sink) - sink
        unused = -(stop - start) % BLOCK_MULTIPLE
        tiles.append(
            _Tile(
                queries=slice(start, stop),
                block=stop - start + unused,
                keys=slice(low, low + num_keys),
                first_B=F.pad(first_T[start:stop] - low, (0, unused)),
                last_B=F.pad(last_T[start:stop] - low, (0, unused)),
                left=slice(0, first[stop - 1] - low),
                right=slice(last[start] + 1 - low, num_keys),
            )
        )
        start = stop
    return tiles


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TNK: torch.Tensor,
        k_GSK: torch.Tensor,
        v_GSV: torch.Tensor,
        sink_N: torch.Tensor | None,
        tiles: list[_Tile],
        scale: float,
        blocks: ChosenBlocks | None,
        scores_TGC: torch.Tensor | None,
        score_block: int | None,
    ) -> torch.Tensor:
        """Compute the output, and fill `scores_TGC`."""
        ctx.save_for_backward(q_TNK, k_GSK, v_GSV, sink_N)
        ctx.tiles, ctx.scale, ctx.blocks = tiles, scale, blocks
        out_TNV = q_TNK.new_empty(*q_TNK.shape[:2], v_GSV.shape[2])
        for tile in tiles:
            q_GMK = pack_rows(q_TNK[tile.queries], block=tile.block, num_kv_heads=len(k_GSK))
            k_GCK, v_GCV = _columns(k_GSK, tile, sink_N), _columns(v_GSV, tile, sink_N)
            probabilities_GMC = _probabilities(q_GMK, k_GCK, sink_N, tile, scale, blocks)
            if scores_TGC is not None:
                assert score_block is not None
                _write_scores(probabilities_GMC, tile, score_block, scores_TGC[tile.queries])
            out_GMV = torch.bmm(probabilities_GMC, v_GCV)
            unpack_rows(out_GMV, out_TNV[tile.queries], block=tile.block, num_kv_heads=len(k_GSK))
        return out_TNV

    @staticmethod
    def backward(ctx: Any, grad_TNV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_TNK, k_GSK, v_GSV, sink_N = ctx.saved_tensors
        grad_q_TNK = torch.empty_like(q_TNK)
        grad_k_GSK = torch.zeros_like(k_GSK, dtype=wide_dtype(k_GSK.dtype))
        grad_v_GSV = torch.zeros_like(v_GSV, dtype=wide_dtype(v_GSV.dtype))
        grad_sink_N = None if sink_N is None else torch.zeros_like(sink_N, dtype=wide_dtype(sink_N.dtype))
        for tile in ctx.tiles:
            rows = {"block": tile.block, "num_kv_heads": len(k_GSK)}
            q_GMK, grad_GMV = pack_rows(q_TNK[tile.queries], **rows), pack_rows(grad_TNV[tile.queries], **rows)
            k_GCK, v_GCV = _columns(k_GSK, tile, sink_N), _columns(v_GSV, tile, sink_N)
            probabilities_GMC = _probabilities(q_GMK, k_GCK, sink_N, tile, ctx.scale, ctx.blocks)
            grad_logits_GMC = logits_gradient(probabilities_GMC, v_GCV, grad_GMV)
            unpack_rows(scaled_product(grad_logits_GMC, k_GCK, ctx.scale), grad_q_TNK[tile.queries], **rows)
            num_keys = tile.keys.stop - tile.keys.start
            grad_k_GCK = scaled_product(grad_logits_GMC.transpose(1, 2), q_GMK, ctx.scale)
            grad_k_GSK[:, tile.keys] += grad_k_GCK[:, :num_keys]
            grad_v_GSV[:, tile.keys] += torch.bmm(probabilities_GMC.transpose(1, 2), grad_GMV)[:, :num_keys]
            if grad_sink_N is not None:
                grad_sink_N += sink_gradient(grad_logits_GMC, **rows)
        if grad_sink_N is not None:
            grad_sink_N = grad_sink_N.to(sink_N.dtype)
        return grad_q_TNK, grad_k_GSK.to(k_GSK.dtype), grad_v_GSV.to(v_GSV.dtype), grad_sink_N, *(None,) * 5


def _columns(x_GSX: torch.Tensor, tile: _Tile, sink_N: torch.Tensor | None) -> torch.Tensor:
    """Return the keys or values of a tile [G, C, X], with a row of zeros for the sink."""
    x_GCX = x_GSX[:, tile.keys]
    return x_GCX if sink_N is None else F.pad(x_GCX, (0, 0, 0, 1))


def _probabilities(
    q_GMK: torch.Tensor,
    k_GCK: torch.Tensor,
    sink_N: torch.Tensor | None,
    tile: _Tile,
    scale: float,
    blocks: ChosenBlocks | None,
) -> torch.Tensor:
    logits_GMC = scaled_product(q_GMK, k_GCK.transpose(1, 2), scale)
    logits_XBC = logits_GMC.view(-1, tile.block, k_GCK.shape[1])
    columns_C = torch.arange(k_GCK.shape[1], device=q_GMK.device)
    before_BC = columns_C[tile.left] < tile.first_B.to(q_GMK.device)[:, None]
    after_BC = columns_C[tile.right] > tile.last_B.to(q_GMK.device)[:, None]
    logits_XBC[..., tile.left].masked_fill_(before_BC, float("-inf"))
    logits_XBC[..., tile.right].masked_fill_(after_BC, float("-inf"))
    if blocks is not None:
        hidden_GBC = _not_chosen(blocks, tile, logits_XBC.shape[2])
        logits_XBC.unflatten(0, (len(k_GCK), -1)).masked_fill_(hidden_GBC[:, None], float("-inf"))
    if sink_N is not None:
        write_sink(logits_GMC, sink_N, block=tile.block, num_kv_heads=len(k_GCK))
    return torch.softmax(logits_GMC, dim=-1, out=logits_GMC)


def _block_of_column(tile: _Tile, columns: int, size: int, device: torch.device) -> torch.Tensor:
    """Return the block that each column of a tile has in the sequence of each query, int64 [B, C]; 0 before it."""
    place_BC = torch.arange(columns, device=device) - tile.first_B.to(device)[:, None]
    return place_BC.clamp_(min=0) // size


def _not_chosen(blocks: ChosenBlocks, tile: _Tile, columns: int) -> torch.Tensor:
    """Return whether each column is in no block that the query reads, bool [G, B, C]."""
    ids_TGJ = blocks.ids_TGJ[tile.queries]
    ids_BGJ = F.pad(ids_TGJ, (0, 0, 0, 0, 0, tile.block - len(ids_TGJ)))
    block_BC = _block_of_column(tile, columns, blocks.size, ids_BGJ.device)
    is_read_BGX = chosen_mask(ids_BGJ, max(columns // blocks.size + 1, 1))
    is_read_BGC = is_read_BGX.gather(2, block_BC[:, None].expand(-1, ids_BGJ.shape[1], -1))
    return ~is_read_BGC.transpose(0, 1)


def _write_scores(probabilities_GMC: torch.Tensor, tile: _Tile, size: int, scores_TGX: torch.Tensor) -> None:
    """Write the largest probability of each block, over the query heads of a key/value head. Hidden keys have 0."""
    G, _, C = probabilities_GMC.shape
    keys = min(tile.keys.stop - tile.keys.start, C)
    largest_BGC = probabilities_GMC.view(G, -1, tile.block, C).amax(dim=1).transpose(0, 1)[: len(scores_TGX), :, :keys]
    block_BC = _block_of_column(tile, keys, size, scores_TGX.device)[: len(scores_TGX)]
    block_BC.clamp_(max=scores_TGX.shape[2] - 1)  # columns after the sequence are hidden
    index_BGC = block_BC[:, None].expand(-1, G, -1)
    scores_TGX.scatter_reduce_(2, index_BGC, largest_BGC.to(scores_TGX.dtype), "amax")


def refuse(need: AttentionNeed) -> str | None:
    """Refuse attention to later keys, and block scores of a window."""
    if need.score_block is not None and need.window_keys is not None:
        return f"{NO_SCORES} of a window"
    return None if need.causal else CAUSAL_ONLY


PLUGIN = Backend(priority=20, run=run, refuse=refuse)
