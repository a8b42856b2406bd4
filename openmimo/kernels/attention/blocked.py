"""Causal attention in blocks of queries, each against the keys that any of them may see: never T x T memory.

A tile is a block of consecutive queries of the pack, and the run of keys from the first that its first query sees to
the own key of its last query. First and last visible keys never decrease along a pack, so all queries of the tile see
the middle of the run, and only its ends need a mask (x seen, . masked, p padding, which is masked as well):

               left    middle     right
    query 0    x x x | x x x x | . . . p
    query 1    . x x | x x x x | x . . p
    query 2    . . x | x x x x | x x . p
    query 3    . . . | x x x x | x x x p

A long sequence ends its tile; short sequences share one. Both sizes of a tile are rounded up, with zero queries that
are dropped from the output and with masked keys.

Shapes as in `_tiles`, where L is G: one tile at a time. T queries, S keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from openmimo.kernels.attention import CAUSAL_ONLY, NO_SCORES, AttentionNeed, AttentionOut
from openmimo.kernels.attention._tiles import (
    COLUMNS_MULTIPLE,
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
) -> AttentionOut:
    """Implement `openmimo.kernels.attention.attend`."""
    k_GSK, v_GSV = (F.pad(x.transpose(0, 1), (0, 0, 0, COLUMNS_MULTIPLE)) for x in (k_SGK, v_SGV))
    return AttentionOut(_Blocked.apply(q_TNK, k_GSK, v_GSV, sink_N, _plan(need), scale))


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
    ) -> torch.Tensor:
        ctx.save_for_backward(q_TNK, k_GSK, v_GSV, sink_N)
        ctx.tiles, ctx.scale = tiles, scale
        out_TNV = q_TNK.new_empty(*q_TNK.shape[:2], v_GSV.shape[2])
        for tile in tiles:
            q_GMK = pack_rows(q_TNK[tile.queries], block=tile.block, num_kv_heads=len(k_GSK))
            k_GCK, v_GCV = _columns(k_GSK, tile, sink_N), _columns(v_GSV, tile, sink_N)
            probabilities_GMC = _probabilities(q_GMK, k_GCK, sink_N, tile, scale)
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
            probabilities_GMC = _probabilities(q_GMK, k_GCK, sink_N, tile, ctx.scale)
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
        return grad_q_TNK, grad_k_GSK.to(k_GSK.dtype), grad_v_GSV.to(v_GSV.dtype), grad_sink_N, None, None


def _columns(x_GSX: torch.Tensor, tile: _Tile, sink_N: torch.Tensor | None) -> torch.Tensor:
    """Return the keys or values of a tile [G, C, X], with a row of zeros for the sink."""
    x_GCX = x_GSX[:, tile.keys]
    return x_GCX if sink_N is None else F.pad(x_GCX, (0, 0, 0, 1))


def _probabilities(
    q_GMK: torch.Tensor, k_GCK: torch.Tensor, sink_N: torch.Tensor | None, tile: _Tile, scale: float
) -> torch.Tensor:
    logits_GMC = scaled_product(q_GMK, k_GCK.transpose(1, 2), scale)
    logits_XBC = logits_GMC.view(-1, tile.block, k_GCK.shape[1])
    columns_C = torch.arange(k_GCK.shape[1], device=q_GMK.device)
    before_BC = columns_C[tile.left] < tile.first_B.to(q_GMK.device)[:, None]
    after_BC = columns_C[tile.right] > tile.last_B.to(q_GMK.device)[:, None]
    logits_XBC[..., tile.left].masked_fill_(before_BC, float("-inf"))
    logits_XBC[..., tile.right].masked_fill_(after_BC, float("-inf"))
    if sink_N is not None:
        write_sink(logits_GMC, sink_N, block=tile.block, num_kv_heads=len(k_GCK))
    return torch.softmax(logits_GMC, dim=-1, out=logits_GMC)


def refuse(need: AttentionNeed) -> str | None:
    """Refuse block scores and attention to later keys."""
    if need.score_block is not None:
        return NO_SCORES
    return None if need.causal else CAUSAL_ONLY


PLUGIN = Backend(priority=20, run=run, refuse=refuse)
