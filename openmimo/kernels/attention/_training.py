"""Launches the kernels of `_triton_training`: documents, tilings, gradients by autograd. Not yet run on a GPU.

T tokens, N query heads, G key/value heads, K key dim, V value dim, C tiles of queries.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from openmimo.kernels.attention import _triton_training as kernels
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
        kernels.forward[tiles.grid](
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
    kernels.gradient_of_queries[tiles.grid](
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
    kernels.gradient_of_keys[(triton.cdiv(T, tiling.block) * G,)](
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
