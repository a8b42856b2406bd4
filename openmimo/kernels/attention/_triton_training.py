"""The Triton kernels of attention of packs of documents, with gradients. Not yet run on a GPU.

A pack is one stream of tokens. Each token knows the first token of its document, so tiles need no alignment to
documents, and a launch depends only on the number of tokens. T tokens, N query heads, G key/value heads, R = N / G,
K key dim (read as two powers of two: 192 = 128 + 64), V value dim (a power of two).

Forward, and gradient of the queries: a program computes some queries with all R heads of one key/value head. Its rows
run over queries first. With R = 2, a window of 5, four queries, blocks of 4 keys and a tail of 4:

    key                    0 1 2 3   4 5 6 7   8 9 10 11
    query 8   head 0, 1              x x x x   x             keys 4 to 7: a block, anchored to the first query's key
    query 9   head 0, 1                x x x   x x           keys 8 to 11: the tail, the only part with later keys
    query 10  head 0, 1                  x x   x x x
    query 11  head 0, 1                    x   x x x x

So 16 queries with a window of 128 read 144 keys, in two products. Layers without a window read blocks from the first
key of the document on, most of them without a mask.

Gradient of keys and values: a program owns a block of keys and loops over the query heads and over blocks of queries
that see them. Every output has one writer, so there are no atomics, and two runs have the same bits.

The forward pass keeps the output and, in base 2, the logarithm of the sum of the exponentials, sink included. The
gradient of the logits is P (dP - delta), where delta = sum of dO O over the value dims; the gradient of a sink is
-sum of P_sink delta over the tokens. The kernel of the queries' gradient computes delta, which the next one reads.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from openmimo.runtime.device import uploaded

_MIN_TILE = 16  # of a matrix product
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tiling:
    """The shape of the programs of one kernel.

    Attributes:
        rows: Rows of a tile: queries times query heads of a key/value head; for the gradient of keys, queries.
        block: Keys of a block.
        warps: Warps of a program.
        stages: Blocks that are loaded ahead in a loop, plus one.
        unrolled: Whether the blocks of a window are a straight line of code, not a loop.
        descriptors: Whether tensor descriptors (TMA) load the blocks, not pointers.
        registers: Limit of the registers of a thread (None: none but the processor's).
    """

    rows: int
    block: int
    warps: int
    stages: int = 2
    unrolled: bool = False
    descriptors: bool = True
    registers: int | None = None


@dataclass(frozen=True)
class Plan:
    """The tiling of each kernel: forward, gradient of the queries, gradient of the keys and values."""

    forward: Tiling
    queries: Tiling
    keys: Tiling


# From registers, shared memory and bytes of the compiled kernels, not from measured times: see docs/log.md.
WINDOW_PLAN = Plan(
    forward=Tiling(rows=128, block=32, warps=8, registers=128),
    queries=Tiling(rows=64, block=32, warps=4, stages=3),
    keys=Tiling(rows=32, block=64, warps=4),
)
FULL_PLAN = Plan(
    forward=Tiling(rows=128, block=64, warps=8, stages=3),
    queries=Tiling(rows=128, block=64, warps=8),
    keys=Tiling(rows=32, block=128, warps=8),
)
FLOAT32_PLAN = Plan(
    forward=Tiling(rows=64, block=32, warps=4, stages=1, descriptors=False),
    queries=Tiling(rows=64, block=32, warps=4, stages=1, descriptors=False),
    keys=Tiling(rows=32, block=32, warps=4, stages=1, descriptors=False),
)


class Documents(NamedTuple):
    """The documents of a pack, on the device.

    Attributes:
        starts_T: int32, the first token of each token's document.
        stops_T: int32, the token after the last of each token's document.
        lengths: Tokens of each document, on the host.
    """

    starts_T: torch.Tensor
    stops_T: torch.Tensor
    lengths: tuple[int, ...]


@functools.lru_cache(maxsize=4)  # all layers of a pass use the same lengths
@torch.inference_mode(False)  # a later pass may save the cached tensors for its backward
def documents_of(lengths: tuple[int, ...], device: torch.device) -> Documents:
    """Upload the documents of a pack without waiting for the device."""
    starts_T, stops_T = _edges(lengths)
    return Documents(uploaded(starts_T, torch.int32, device), uploaded(stops_T, torch.int32, device), lengths)


def _edges(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    stops = np.cumsum(np.asarray(lengths, dtype=np.int64))
    return np.repeat(stops - lengths, lengths), np.repeat(stops, lengths)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _longest_first(lengths: tuple[int, ...], size: int, of_keys: bool, device: torch.device) -> torch.Tensor:
    """Return the tiles of `size` tokens, int32, those with the most work first, for layers without a window.

    Args:
        lengths: Tokens of each document.
        size: Tokens of a tile.
        of_keys: Whether a tile is a block of keys, whose work is the queries after it, and not the keys before it.
        device: Where the result is.
    """
    starts_T, stops_T = _edges(lengths)
    first = np.arange(0, len(starts_T), size)
    last = np.minimum(first + size, len(starts_T)) - 1
    work = stops_T[last] - first if of_keys else last - starts_T[first]
    return uploaded(np.argsort(-work, kind="stable"), torch.int32, device)


def attend_pack(
    q_TNK: torch.Tensor,
    k_TGK: torch.Tensor,
    v_TGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    documents: Documents,
    *,
    scale: float,
    window_keys: int | None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Causal attention within the documents of a pack, [T, N, V]. Differentiable in q, k, v and sink.

    Args:
        q_TNK: Queries.
        k_TGK: Keys.
        v_TGV: Values.
        sink_N: Sink logits, or None.
        documents: The documents of the pack.
        scale: Factor of the logits.
        window_keys: Keys that a query sees, its own included (None: all).
        plan: The tiling of the kernels (None: by dtype and window).
    """
    if plan is None:
        plan = FLOAT32_PLAN if q_TNK.dtype == torch.float32 else FULL_PLAN if window_keys is None else WINDOW_PLAN
    V = v_TGV.shape[2]
    q_TNK, k_TGK = (_padded(x, sum(_two_powers(x.shape[2]))) for x in (q_TNK, k_TGK))
    v_TGV = _padded(v_TGV, max(_MIN_TILE, triton.next_power_of_2(V)))
    return _Attention.apply(q_TNK, k_TGK, v_TGV, sink_N, documents, scale, window_keys, plan)[..., :V]


def _two_powers(dims: int) -> tuple[int, int]:
    """Return a power of two, and a smaller one or 0, whose sum is at least `dims`: 192 is 128 + 64."""
    if dims <= _MIN_TILE:
        return _MIN_TILE, 0
    first = 1 << (dims.bit_length() - 1)
    rest = dims - first
    return first, max(_MIN_TILE, triton.next_power_of_2(rest)) if rest else 0


def _padded(x_TXX: torch.Tensor, dims: int) -> torch.Tensor:
    missing = dims - x_TXX.shape[2]
    return torch.nn.functional.pad(x_TXX, (0, missing)) if missing else x_TXX


def _in_rows(x_TXX: torch.Tensor) -> torch.Tensor:
    """Return the tensor with its heads in one contiguous run for each token, aligned as descriptors need it."""
    heads_in_a_run = x_TXX.stride(2) == 1 and x_TXX.stride(1) == x_TXX.shape[2]
    aligned = x_TXX.data_ptr() % 16 == 0 and x_TXX.stride(0) * x_TXX.element_size() % 16 == 0
    return x_TXX if heads_in_a_run and aligned else x_TXX.contiguous()


def _descriptor(x_TXX: torch.Tensor, rows: int, columns: int, tiling: Tiling) -> TensorDescriptor | None:
    """Return a descriptor of blocks [rows, columns] of the tensor as a matrix with a row for each token."""
    if not tiling.descriptors or columns == 0:
        return None
    T, heads, dims = x_TXX.shape
    return TensorDescriptor(x_TXX, [T, heads * dims], [x_TXX.stride(0), 1], [rows, columns])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TNK: torch.Tensor,
        k_TGK: torch.Tensor,
        v_TGV: torch.Tensor,
        sink_N: torch.Tensor | None,
        documents: Documents,
        scale: float,
        window_keys: int | None,
        plan: Plan,
    ) -> torch.Tensor:
        q_TNK, k_TGK, v_TGV = (_in_rows(x) for x in (q_TNK, k_TGK, v_TGV))
        tiles = _Tiles(q_TNK, k_TGK, v_TGV, documents, window_keys, plan.forward)
        out_TNV = q_TNK.new_empty(*q_TNK.shape[:2], v_TGV.shape[2])
        lse_NT = q_TNK.new_empty(q_TNK.shape[1], q_TNK.shape[0], dtype=torch.float32)
        _forward[tiles.grid](
            q_TNK, *tiles.keys_and_values, sink_N, tiles.order, documents.starts_T, out_TNV, lse_NT, scale * _LOG2_E,
            *tiles.sizes, **tiles.constants, HAS_SINK=sink_N is not None,
        )  # fmt: skip
        ctx.save_for_backward(q_TNK, k_TGK, v_TGV, sink_N, out_TNV, lse_NT, documents.starts_T, documents.stops_T)
        ctx.lengths, ctx.scale, ctx.window_keys, ctx.plan = documents.lengths, scale, window_keys, plan
        return out_TNV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TNV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_TNK, k_TGK, v_TGV, sink_N, out_TNV, lse_NT, starts_T, stops_T = ctx.saved_tensors
        documents = Documents(starts_T, stops_T, ctx.lengths)
        grad_TNV = _in_rows(grad_TNV)
        grad_q_TNK, grad_sink_N, delta_NT = _query_gradients(
            (q_TNK, k_TGK, v_TGV), sink_N, out_TNV, grad_TNV, lse_NT, documents, ctx
        )
        grad_k_TGK, grad_v_TGV = _key_gradients((q_TNK, k_TGK, v_TGV), grad_TNV, lse_NT, delta_NT, documents, ctx)
        return grad_q_TNK, grad_k_TGK, grad_v_TGV, grad_sink_N, None, None, None, None


def _query_gradients(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sink_N: torch.Tensor | None,
    out_TNV: torch.Tensor,
    grad_TNV: torch.Tensor,
    lse_NT: torch.Tensor,
    documents: Documents,
    ctx: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return the gradients of queries and sinks, and delta [N, T]."""
    q_TNK, k_TGK, v_TGV = inputs
    tiles = _Tiles(q_TNK, k_TGK, v_TGV, documents, ctx.window_keys, ctx.plan.queries)
    grad_q_TNK = q_TNK.new_empty(q_TNK.shape)
    delta_NT = torch.empty_like(lse_NT)
    sinks_CN = None if sink_N is None else lse_NT.new_empty(tiles.count, len(sink_N))
    _gradient_of_queries[tiles.grid](
        q_TNK, *tiles.keys_and_values, sink_N, tiles.order, documents.starts_T, out_TNV, grad_TNV, lse_NT, delta_NT,
        grad_q_TNK, sinks_CN, ctx.scale * _LOG2_E, ctx.scale, grad_TNV.stride(0), *tiles.sizes, **tiles.constants,
        HAS_SINK=sink_N is not None,
    )  # fmt: skip
    grad_sink_N = None if sink_N is None or sinks_CN is None else sinks_CN.sum(0).to(sink_N.dtype)
    return grad_q_TNK, grad_sink_N, delta_NT


def _key_gradients(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grad_TNV: torch.Tensor,
    lse_NT: torch.Tensor,
    delta_NT: torch.Tensor,
    documents: Documents,
    ctx: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of keys and values."""
    q_TNK, k_TGK, v_TGV = inputs
    T, N, K = q_TNK.shape
    G, V = v_TGV.shape[1:]
    tiling: Tiling = ctx.plan.keys
    first_dims, rest_dims = _two_powers(K)
    order = None
    if ctx.window_keys is None:
        order = _longest_first(documents.lengths, tiling.block, True, q_TNK.device)
    grad_k_TGK, grad_v_TGV = k_TGK.new_empty(k_TGK.shape), v_TGV.new_empty(v_TGV.shape)
    _gradient_of_keys[(triton.cdiv(T, tiling.block) * G,)](
        q_TNK, grad_TNV, k_TGK, v_TGV, _descriptor(q_TNK, tiling.rows, first_dims, tiling),
        _descriptor(q_TNK, tiling.rows, rest_dims, tiling), _descriptor(grad_TNV, tiling.rows, V, tiling),
        order, documents.starts_T, documents.stops_T, lse_NT, delta_NT, grad_k_TGK, grad_v_TGV,
        ctx.scale * _LOG2_E, ctx.scale, T, G, q_TNK.stride(0), k_TGK.stride(0), v_TGV.stride(0), grad_TNV.stride(0),
        HEADS=N // G, FIRST=first_dims, REST=rest_dims, VALUES=V, QUERIES=tiling.rows, BLOCK=tiling.block,
        WINDOW=ctx.window_keys or 0, PRECISION=_precision(q_TNK.dtype), IS_TMA=tiling.descriptors,
        num_warps=tiling.warps, num_stages=tiling.stages, maxnreg=tiling.registers,
    )  # fmt: skip
    return grad_k_TGK, grad_v_TGV


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


class _Tiles:
    """The launch of a kernel whose programs are tiles of queries.

    Attributes:
        count: Tiles of queries.
        grid: Programs.
        order: The tiles in the order of the programs, int32; None for that of the tokens.
        keys_and_values: Their arguments.
        sizes: Tokens, key/value heads and strides.
        constants: Constants of the compilation.
    """

    def __init__(
        self,
        q_TNK: torch.Tensor,
        k_TGK: torch.Tensor,
        v_TGV: torch.Tensor,
        documents: Documents,
        window_keys: int | None,
        tiling: Tiling,
    ):
        T, N, K = q_TNK.shape
        G, V = v_TGV.shape[1:]
        heads = triton.next_power_of_2(N // G)
        queries = max(tiling.rows // heads, 1)
        first_dims, rest_dims = _two_powers(K)
        block = tiling.block
        if window_keys is not None:
            block = min(block, max(_MIN_TILE, triton.next_power_of_2(window_keys)))
        self.count = triton.cdiv(T, queries)
        self.grid = (self.count * G,)
        self.order = None if window_keys else _longest_first(documents.lengths, queries, False, q_TNK.device)
        self.keys_and_values = (
            k_TGK,
            v_TGV,
            _descriptor(k_TGK, block, first_dims, tiling),
            _descriptor(k_TGK, block, rest_dims, tiling),
            _descriptor(v_TGV, block, V, tiling),
        )
        self.sizes = (T, G, q_TNK.stride(0), k_TGK.stride(0), v_TGV.stride(0))
        self.constants = {
            "HEADS": N // G,
            "HEADS_PAD": heads,
            "ROWS": max(queries * heads, _MIN_TILE),
            "FIRST": first_dims,
            "REST": rest_dims,
            "VALUES": V,
            "BLOCK": block,
            "TAIL": max(queries, _MIN_TILE),
            "WINDOW": window_keys or 0,
            "IS_UNROLLED": tiling.unrolled and window_keys is not None,
            "PRECISION": _precision(q_TNK.dtype),
            "IS_TMA": tiling.descriptors,
            "num_warps": tiling.warps,
            "num_stages": tiling.stages,
            "maxnreg": tiling.registers,
        }


@triton.jit
def _rows(source, first, num_rows, stride, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of the rows from `first` on and the columns from `column` on; 0 outside of the rows."""
    row = first + tl.arange(0, ROWS)
    place = row.to(tl.int64)[:, None] * stride + (column + tl.arange(0, COLUMNS))[None, :]
    return tl.load(source + place, mask=((row >= 0) & (row < num_rows))[:, None], other=0.0)


@triton.jit
def _block(source, first, FIRST: tl.constexpr, REST: tl.constexpr, VALUES: tl.constexpr, SIZE: tl.constexpr,
           IS_TMA: tl.constexpr):  # fmt: skip
    """The first dims, the other dims and the values of `SIZE` tokens of a head; 0 outside of the pack.

    `source` has the two tensors, their descriptors, the head, the number of tokens and the two strides.
    """
    k, v, k_first, k_rest, v_all, head, num_tokens, stride_k, stride_v = source
    column, v_column = head * (FIRST + REST), head * VALUES
    if IS_TMA:
        first_dims = k_first.load([first, column])
        rest_dims = first_dims
        if REST > 0:
            rest_dims = k_rest.load([first, column + FIRST])
        values = v_all.load([first, v_column])
    else:
        first_dims = _rows(k, first, num_tokens, stride_k, column, SIZE, FIRST)
        rest_dims = first_dims
        if REST > 0:
            rest_dims = _rows(k, first, num_tokens, stride_k, column + FIRST, SIZE, REST)
        values = _rows(v, first, num_tokens, stride_v, v_column, SIZE, VALUES)
    return first_dims, rest_dims, values


@triton.jit
def _logits(rows, k_first, k_rest, first, scale, SIZE: tl.constexpr, REST: tl.constexpr, MASK: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Logits in base 2 of the rows with `SIZE` keys from `first` on; -inf for those that a row does not see.

    MASK is 0 if all rows see all keys, 1 if the keys may be too old, 2 if they may also be later than the query.
    """
    q_first, q_rest, query, oldest = rows
    logits = tl.dot(q_first, tl.trans(k_first), input_precision=PRECISION)
    if REST > 0:
        logits = tl.dot(q_rest, tl.trans(k_rest), logits, input_precision=PRECISION)
    logits *= scale
    key = first + tl.arange(0, SIZE)
    if MASK == 1:
        logits = tl.where(key[None, :] >= oldest[:, None], logits, float("-inf"))
    elif MASK == 2:
        is_seen = (key[None, :] >= oldest[:, None]) & (key[None, :] <= query[:, None])
        logits = tl.where(is_seen, logits, float("-inf"))
    return logits


@triton.jit
def _add_keys(state, rows, source, first, scale, FIRST: tl.constexpr, REST: tl.constexpr, VALUES: tl.constexpr,
              SIZE: tl.constexpr, IS_TMA: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The running maximum, sum and weighted values after `SIZE` more keys."""
    largest, total, sum_values = state
    k_first, k_rest, values = _block(source, first, FIRST, REST, VALUES, SIZE, IS_TMA)
    logits = _logits(rows, k_first, k_rest, first, scale, SIZE, REST, MASK, PRECISION)
    new_largest = tl.maximum(largest, tl.max(logits, axis=1))
    probabilities = tl.exp2(logits - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(probabilities, axis=1)
    sum_values = tl.dot(probabilities.to(values.dtype), values, sum_values * shrink[:, None], input_precision=PRECISION)
    return new_largest, total, sum_values


@triton.jit
def _tile_rows(order, starts, num_tokens, num_groups, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr,
               ROWS: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """The rows of a program: their queries, heads and oldest keys, and whether they exist."""
    tile, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    if WINDOW == 0:
        tile = tl.load(order + tile)
    QUERIES: tl.constexpr = ROWS // HEADS_PAD
    row = tl.arange(0, ROWS)
    first_query = tile * QUERIES
    query, head = first_query + row // HEADS_PAD, group * HEADS + row % HEADS_PAD
    is_row = (query < num_tokens) & (row % HEADS_PAD < HEADS)
    oldest = tl.load(starts + query, mask=query < num_tokens, other=0)
    if WINDOW > 0:
        oldest = tl.maximum(oldest, query - (WINDOW - 1))
    return tile, group, first_query, query, head, is_row, oldest


@triton.jit
def _block_range(starts, first_query, num_tokens, QUERIES: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """The first keys of the first block, of the first block without a mask, and of the tail."""
    tail = first_query + 1
    first_start = tl.load(starts + first_query)
    if WINDOW > 0:
        oldest = tl.maximum(first_start, first_query - (WINDOW - 1))
        start = tail - (tail - oldest + BLOCK - 1) // BLOCK * BLOCK
        whole = tail
    else:
        last_start = tl.load(starts + tl.minimum(first_query + QUERIES, num_tokens) - 1)
        start = tail - (tail - first_start + BLOCK - 1) // BLOCK * BLOCK
        whole = tail - tl.maximum(tail - last_start, 0) // BLOCK * BLOCK
    return start, whole, tail


@triton.jit(do_not_specialize=["num_tokens"])
def _forward(
    q, k, v, k_first, k_rest, v_all, sink, order, starts, out, lse, scale,
    num_tokens, num_groups, stride_q, stride_k, stride_v,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    VALUES: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, WINDOW: tl.constexpr, IS_UNROLLED: tl.constexpr,
    PRECISION: tl.constexpr, IS_TMA: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    tile, group, first_query, query, head, is_row, oldest = _tile_rows(
        order, starts, num_tokens, num_groups, HEADS, HEADS_PAD, ROWS, WINDOW
    )
    q_rows = q + query.to(tl.int64)[:, None] * stride_q + head[:, None] * (FIRST + REST)
    q_first = tl.load(q_rows + tl.arange(0, FIRST)[None, :], mask=is_row[:, None], other=0.0)
    q_rest = q_first
    if REST > 0:
        q_rest = tl.load(q_rows + (FIRST + tl.arange(0, REST))[None, :], mask=is_row[:, None], other=0.0)
    largest = tl.full((ROWS,), -1e30, tl.float32)  # finite, so that rows whose keys are all hidden have no NaN
    total = tl.zeros((ROWS,), tl.float32)
    if HAS_SINK:
        sink_rows = tl.load(sink + head, mask=is_row, other=0.0).to(tl.float32) * 1.4426950408889634
        largest = tl.maximum(largest, sink_rows)
        total = tl.exp2(sink_rows - largest)
    sum_values = tl.zeros((ROWS, VALUES), tl.float32)
    source = (k, v, k_first, k_rest, v_all, group, num_tokens, stride_k, stride_v)
    rows = (q_first, q_rest, query, oldest)
    state = (largest, total, sum_values)
    start, whole, tail = _block_range(starts, first_query, num_tokens, ROWS // HEADS_PAD, BLOCK, WINDOW)
    if ROWS > HEADS_PAD:  # the tile has a second query
        state = _add_keys(state, rows, source, tail, scale, FIRST, REST, VALUES, TAIL, False, 2, PRECISION)
    if IS_UNROLLED:
        for i in tl.static_range((WINDOW + BLOCK - 1) // BLOCK):
            first = tail - (i + 1) * BLOCK
            state = _add_keys(state, rows, source, first, scale, FIRST, REST, VALUES, BLOCK, IS_TMA, 1, PRECISION)
    else:
        for first in range(start, whole, BLOCK):
            state = _add_keys(state, rows, source, first, scale, FIRST, REST, VALUES, BLOCK, IS_TMA, 1, PRECISION)
        if WINDOW == 0:
            for first in range(whole, tail, BLOCK):
                state = _add_keys(state, rows, source, first, scale, FIRST, REST, VALUES, BLOCK, IS_TMA, 0, PRECISION)
    largest, total, sum_values = state
    place = (query.to(tl.int64) * (num_groups * HEADS) + head)[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
    result = sum_values / tl.where(is_row, total, 1.0)[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=is_row[:, None])
    tl.store(lse + head.to(tl.int64) * num_tokens + query, largest + tl.log2(total), mask=is_row)


@triton.jit
def _add_gradients(state, rows, outputs, source, first, scale, FIRST: tl.constexpr, REST: tl.constexpr,
                   VALUES: tl.constexpr, SIZE: tl.constexpr, IS_TMA: tl.constexpr, MASK: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """The gradient of the queries, without the scale, after `SIZE` more keys."""
    grad_first, grad_rest = state
    grad, lse, delta = outputs
    k_first, k_rest, values = _block(source, first, FIRST, REST, VALUES, SIZE, IS_TMA)
    logits = _logits(rows, k_first, k_rest, first, scale, SIZE, REST, MASK, PRECISION)
    probabilities = tl.exp2(logits - lse[:, None])
    grad_probabilities = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
    grad_logits = (probabilities * (grad_probabilities - delta[:, None])).to(k_first.dtype)
    grad_first = tl.dot(grad_logits, k_first, grad_first, input_precision=PRECISION)
    if REST > 0:
        grad_rest = tl.dot(grad_logits, k_rest, grad_rest, input_precision=PRECISION)
    return grad_first, grad_rest


@triton.jit(do_not_specialize=["num_tokens"])
def _gradient_of_queries(
    q, k, v, k_first, k_rest, v_all, sink, order, starts, out, grad_out, lse, delta, grad_q, grad_sinks, scale,
    plain_scale, stride_g, num_tokens, num_groups, stride_q, stride_k, stride_v,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    VALUES: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, WINDOW: tl.constexpr, IS_UNROLLED: tl.constexpr,
    PRECISION: tl.constexpr, IS_TMA: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    tile, group, first_query, query, head, is_row, oldest = _tile_rows(
        order, starts, num_tokens, num_groups, HEADS, HEADS_PAD, ROWS, WINDOW
    )
    value_dims = tl.arange(0, VALUES)[None, :]
    place = (query.to(tl.int64) * (num_groups * HEADS) + head)[:, None]
    out_rows = tl.load(out + place * VALUES + value_dims, mask=is_row[:, None], other=0.0)
    grad_rows = grad_out + query.to(tl.int64)[:, None] * stride_g + head[:, None] * VALUES
    grad = tl.load(grad_rows + value_dims, mask=is_row[:, None], other=0.0)
    delta_rows = tl.sum(out_rows.to(tl.float32) * grad.to(tl.float32), axis=1)
    number = head.to(tl.int64) * num_tokens + query
    lse_rows = tl.load(lse + number, mask=is_row, other=0.0)
    tl.store(delta + number, delta_rows, mask=is_row)
    if HAS_SINK:
        sink_rows = tl.load(sink + head, mask=is_row, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        sinks = tl.exp2(sink_rows - lse_rows) * -delta_rows
        sinks = tl.sum(tl.reshape(sinks, (ROWS // HEADS_PAD, HEADS_PAD)), axis=0)
        heads = tl.arange(0, HEADS_PAD)
        tl.store(grad_sinks + (tile * num_groups + group) * HEADS + heads, sinks, mask=heads < HEADS)
    q_rows = q + query.to(tl.int64)[:, None] * stride_q + head[:, None] * (FIRST + REST)
    q_first = tl.load(q_rows + tl.arange(0, FIRST)[None, :], mask=is_row[:, None], other=0.0)
    grad_first = tl.zeros((ROWS, FIRST), tl.float32)
    q_rest, grad_rest = q_first, grad_first
    if REST > 0:
        q_rest = tl.load(q_rows + (FIRST + tl.arange(0, REST))[None, :], mask=is_row[:, None], other=0.0)
        grad_rest = tl.zeros((ROWS, REST), tl.float32)
    source = (k, v, k_first, k_rest, v_all, group, num_tokens, stride_k, stride_v)
    rows = (q_first, q_rest, query, oldest)
    outputs = (grad, lse_rows, delta_rows)
    state = (grad_first, grad_rest)
    start, whole, tail = _block_range(starts, first_query, num_tokens, ROWS // HEADS_PAD, BLOCK, WINDOW)
    if ROWS > HEADS_PAD:  # the tile has a second query
        state = _add_gradients(
            state, rows, outputs, source, tail, scale, FIRST, REST, VALUES, TAIL, False, 2, PRECISION
        )
    if IS_UNROLLED:
        for i in tl.static_range((WINDOW + BLOCK - 1) // BLOCK):
            first = tail - (i + 1) * BLOCK
            state = _add_gradients(
                state, rows, outputs, source, first, scale, FIRST, REST, VALUES, BLOCK, IS_TMA, 1, PRECISION
            )
    else:
        for first in range(start, whole, BLOCK):
            state = _add_gradients(
                state, rows, outputs, source, first, scale, FIRST, REST, VALUES, BLOCK, IS_TMA, 1, PRECISION
            )
        if WINDOW == 0:
            for first in range(whole, tail, BLOCK):
                state = _add_gradients(
                    state, rows, outputs, source, first, scale, FIRST, REST, VALUES, BLOCK, IS_TMA, 0, PRECISION
                )
    grad_first, grad_rest = state
    target = grad_q + place * (FIRST + REST)
    kind = grad_q.dtype.element_ty
    tl.store(target + tl.arange(0, FIRST)[None, :], (grad_first * plain_scale).to(kind), mask=is_row[:, None])
    if REST > 0:
        rest = FIRST + tl.arange(0, REST)[None, :]
        tl.store(target + rest, (grad_rest * plain_scale).to(kind), mask=is_row[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _gradient_of_keys(
    q, grad_out, k, v, q_first, q_rest, grad_all, order, starts, stops, lse, delta, grad_k, grad_v, scale, plain_scale,
    num_tokens, num_groups, stride_q, stride_k, stride_v, stride_g,
    HEADS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, VALUES: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    if WINDOW == 0:
        tile = tl.load(order + tile)
    first_key = tile * BLOCK
    own = (k, v, None, None, None, group, num_tokens, stride_k, stride_v)
    keys_first, keys_rest, values = _block(own, first_key, FIRST, REST, VALUES, BLOCK, False)
    key = first_key + tl.arange(0, BLOCK)
    last_key = tl.minimum(first_key + BLOCK, num_tokens) - 1
    stop = tl.load(stops + last_key)
    if WINDOW > 0:
        stop = tl.minimum(stop, last_key + WINDOW)
    blocks = (stop - first_key + QUERIES - 1) // QUERIES
    sum_first = tl.zeros((BLOCK, FIRST), tl.float32)
    sum_rest = sum_first
    if REST > 0:
        sum_rest = tl.zeros((BLOCK, REST), tl.float32)
    sum_values = tl.zeros((BLOCK, VALUES), tl.float32)
    for i in range(0, HEADS * blocks):
        head, first = group * HEADS + i // blocks, first_key + i % blocks * QUERIES
        query = first + tl.arange(0, QUERIES)
        source = (q, grad_out, q_first, q_rest, grad_all, head, num_tokens, stride_q, stride_g)
        queries_first, queries_rest, grad = _block(source, first, FIRST, REST, VALUES, QUERIES, IS_TMA)
        is_query = query < num_tokens
        number = head.to(tl.int64) * num_tokens + query
        lse_columns = tl.load(lse + number, mask=is_query, other=0.0)
        delta_columns = tl.load(delta + number, mask=is_query, other=0.0)
        oldest = tl.load(starts + query, mask=is_query, other=num_tokens)
        if WINDOW > 0:
            oldest = tl.maximum(oldest, query - (WINDOW - 1))
        logits = tl.dot(keys_first, tl.trans(queries_first), input_precision=PRECISION)
        if REST > 0:
            logits = tl.dot(keys_rest, tl.trans(queries_rest), logits, input_precision=PRECISION)
        is_seen = (key[:, None] >= oldest[None, :]) & (key[:, None] <= query[None, :])
        probabilities = tl.where(is_seen, tl.exp2(logits * scale - lse_columns[None, :]), 0.0)
        sum_values = tl.dot(probabilities.to(grad.dtype), grad, sum_values, input_precision=PRECISION)
        grad_probabilities = tl.dot(values, tl.trans(grad), input_precision=PRECISION)
        grad_logits = (probabilities * (grad_probabilities - delta_columns[None, :])).to(queries_first.dtype)
        sum_first = tl.dot(grad_logits, queries_first, sum_first, input_precision=PRECISION)
        if REST > 0:
            sum_rest = tl.dot(grad_logits, queries_rest, sum_rest, input_precision=PRECISION)
    is_key = (key < num_tokens)[:, None]
    place = (key.to(tl.int64) * num_groups + group)[:, None]
    target = grad_k + place * (FIRST + REST)
    kind = grad_k.dtype.element_ty
    tl.store(target + tl.arange(0, FIRST)[None, :], (sum_first * plain_scale).to(kind), mask=is_key)
    if REST > 0:
        rest = FIRST + tl.arange(0, REST)[None, :]
        tl.store(target + rest, (sum_rest * plain_scale).to(kind), mask=is_key)
    value_dims = tl.arange(0, VALUES)[None, :]
    tl.store(grad_v + place * VALUES + value_dims, sum_values.to(kind), mask=is_key)
