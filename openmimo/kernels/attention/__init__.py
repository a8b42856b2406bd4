"""Grouped-query attention with an optional window and an optional learned sink, of packed or of paged keys.

`attend` computes attention over packed sequences. T packed queries, S packed keys, N query heads, G key/value heads
(query head n reads head n // (N / G)), K key dim, V value dim. Sequence b has `query_lengths[b]` consecutive queries
and `key_lengths[b]` consecutive keys. Its queries are the last positions of its keys. Query i therefore sees keys
j <= key_length - query_length + i, and with a window only the last `window_keys` of those, its own key included (paper
section 2.2; equations 2-4 for the sink).

`paged_attend` computes attention of the newest positions of sequences to all their positions in a paged cache, to
which `store` writes keys and values. `update_and_attend` does both, and the rotation, for projected heads. A table
maps each run of positions to a page, and sequences with a common prefix may share pages. B sequences, X pages, P
positions a page, Y pages of the longest sequence.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch

from openmimo.core.errors import ConfigError
from openmimo.kernels.dispatch import Dispatcher
from openmimo.kernels.operations import apply_rotary

NO_SCORES = "it computes no block scores"
NO_BLOCKS = "it does not read chosen blocks of keys"
CAUSAL_ONLY = "it computes causal attention only"
Integers: TypeAlias = Literal["full", "half"]
ATTENTION = Dispatcher("openmimo.kernels.attention", "OPENMIMO_ATTENTION")
PAGED_ATTENTION = Dispatcher("openmimo.kernels.paged_attention", "OPENMIMO_PAGED_ATTENTION")
STORE = Dispatcher("openmimo.kernels.paged_attention.store", "OPENMIMO_STORE")
UPDATE = Dispatcher("openmimo.kernels.paged_attention.update", "OPENMIMO_UPDATE")


class AttentionOut(NamedTuple):
    """The result of one call.

    Attributes:
        out_TNV: Attention output, in the dtype of the queries.
        block_scores_TGC: The largest probability that any query head of a key/value head gives to any key of a block,
            float32 or wider, without gradient; 0 for blocks that the query does not see. Block c of a sequence holds
            its keys c * score_block to (c + 1) * score_block - 1; C is the number of blocks of the longest sequence.
            None if the call requests no scores.
    """

    out_TNV: torch.Tensor
    block_scores_TGC: torch.Tensor | None = None


class ChosenBlocks(NamedTuple):
    """The blocks of keys that each query reads; all other keys are hidden from it.

    Attributes:
        ids_TGJ: int64, blocks of its sequence by query and key/value head, ascending, followed by entries of -1. A
            query reads the keys of these blocks up to its own position; it has at least one.
        size: Keys of a block. Block c of a sequence holds its keys c * size to (c + 1) * size - 1.
    """

    ids_TGJ: torch.Tensor
    size: int


@dataclass(frozen=True)
class AttentionNeed:
    """The properties of one call; a backend decides from these alone whether it serves the call.

    Attributes:
        query_lengths: Queries of each sequence.
        key_lengths: Keys of each sequence.
        num_heads: N.
        num_kv_heads: G.
        key_dim: K.
        value_dim: V.
        window_keys: Keys that a query sees, its own included (None: all).
        has_sink: Whether there are sink logits.
        needs_gradients: Whether autograd records and an input requires a gradient.
        dtype: Dtype of the queries.
        on_cpu: Whether the queries are in CPU memory.
        score_block: Keys of a block of the requested block scores (None: no scores).
        causal: Whether later keys are hidden.
        chosen_block: Keys of a block, if each query reads chosen blocks only (None: all blocks).
        integers: The products that may be computed in int8: those of queries and keys ("half"), or also those of
            probabilities and values ("full"); None for none.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window_keys: int | None
    has_sink: bool
    needs_gradients: bool
    dtype: torch.dtype
    on_cpu: bool
    score_block: int | None = None
    causal: bool = True
    chosen_block: int | None = None
    integers: Integers | None = None

    @property
    def is_self_attention(self) -> bool:
        """Whether every sequence has as many queries as keys: training, and prefill with an empty cache."""
        return self.query_lengths == self.key_lengths


def attend(
    q_TNK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGV: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    window_keys: int | None,
    score_block: int | None = None,
    causal: bool = True,
    blocks: ChosenBlocks | None = None,
    integers: Integers | None = None,
) -> AttentionOut:
    """Compute attention of packed queries to packed keys. Differentiable in q, k, v and sink.

    Args:
        q_TNK: Queries. Logits are scaled by 1/sqrt(K).
        k_SGK: Keys.
        v_SGV: Values.
        sink_N: Sink logit of each query head, which is not scaled; or None.
        query_lengths: Queries of each sequence.
        key_lengths: Keys of each sequence.
        window_keys: Keys that a query sees, its own included (None: all).
        score_block: Keys of a block, to request block scores (None: no scores).
        causal: Whether keys after a query's position are hidden. If not, a window extends equally far to both sides.
        blocks: The blocks that each query reads, of a causal call without a window (None: all).
        integers: The products that may be computed in int8, see `AttentionNeed`. For inference.

    Raises:
        ConfigError: `integers` is given and an input requires a gradient.
        ValueError: Lengths and shapes disagree, or chosen blocks are combined with a window or later keys.
    """
    T, N, K = q_TNK.shape
    S, G, V = v_SGV.shape
    if sum(query_lengths) != T or sum(key_lengths) != S or k_SGK.shape != (S, G, K) or N % G:
        raise ValueError(
            f"attention shapes do not fit: q {tuple(q_TNK.shape)}, k {tuple(k_SGK.shape)}, v {tuple(v_SGV.shape)}, "
            f"{sum(query_lengths)} queries and {sum(key_lengths)} keys by length"
        )
    _check_blocks(blocks, (T, G), window_keys=window_keys, score_block=score_block, causal=causal)
    tensors = (q_TNK, k_SGK, v_SGV) if sink_N is None else (q_TNK, k_SGK, v_SGV, sink_N)
    need = AttentionNeed(
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        num_heads=N,
        num_kv_heads=G,
        key_dim=K,
        value_dim=V,
        window_keys=window_keys,
        has_sink=sink_N is not None,
        needs_gradients=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
        dtype=q_TNK.dtype,
        on_cpu=q_TNK.device.type == "cpu",
        score_block=score_block,
        causal=causal,
        chosen_block=None if blocks is None else blocks.size,
        integers=integers,
    )
    if integers is not None and need.needs_gradients:
        raise ConfigError(
            f"attention with integers={integers!r} is for inference and has no gradient; train without it."
        )
    _, backend = ATTENTION.choose(need)
    if blocks is not None:
        return backend.run(q_TNK, k_SGK, v_SGV, sink_N, need=need, scale=1.0 / math.sqrt(K), blocks=blocks)
    return backend.run(q_TNK, k_SGK, v_SGV, sink_N, need=need, scale=1.0 / math.sqrt(K))


def _check_blocks(
    blocks: ChosenBlocks | None,
    rows: tuple[int, int],
    *,
    window_keys: int | None,
    score_block: int | None,
    causal: bool = True,
) -> None:
    if blocks is None:
        return
    if blocks.ids_TGJ.shape[:2] != rows:
        raise ValueError(f"blocks are chosen for {tuple(blocks.ids_TGJ.shape[:2])} queries and heads, not {rows}")
    if window_keys is not None or score_block is not None or not causal:
        raise ValueError("chosen blocks need a causal call without a window and without block scores")


def scale_bytes(dtype: torch.dtype) -> int:
    """Return the bytes of the scale at the end of each key and each value in a cache of this dtype."""
    return torch.float32.itemsize if dtype == torch.int8 else 0


def write_rows(x: torch.Tensor) -> torch.Tensor:
    """Return rows [..., X] in the layout of an int8 cache [..., X + 4]: codes, and the bytes of a float32 scale."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(largest > 0, largest / 127, 1.0)
    return torch.cat([(x / scales).round().to(torch.int8), scales.view(torch.int8)], dim=-1)


def read_rows(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of a cache in `dtype`, those of an int8 cache without their scales."""
    if rows.dtype != torch.int8:
        return rows.to(dtype)
    codes, scales = rows[..., :-4], rows[..., -4:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return (codes * scales).to(dtype)


class Pages(NamedTuple):
    """The keys and values of one layer in the cache.

    In an int8 cache, each key and each value is followed by the four bytes of its float32 scale. The dtype of
    the cache may be narrower than that of the queries. The values of one position are contiguous; the strides of pages
    and positions are free.

    Attributes:
        keys_XPGK: View of the cached keys.
        values_XPGV: View of the cached values.
        tables_BY: int32, the page of positions y*P to y*P + P - 1 of sequence b. Entries of pages wholly before the
            window are never read and may have any value.
    """

    keys_XPGK: torch.Tensor
    values_XPGV: torch.Tensor
    tables_BY: torch.Tensor


class PagedNeed(NamedTuple):
    """The properties of one call; a backend decides from these alone whether it serves the call.

    Attributes:
        longest_query: The largest number of queries of a sequence.
        key_dim: K.
        value_dim: V.
        needs_gradients: Whether autograd records and an input requires a gradient.
        dtype: Dtype of the queries.
        cache_dtype: Dtype of the keys and values.
        on_cpu: Whether the queries are in CPU memory.
        score_block: Keys of a block of the requested block scores (None: no scores).
        chosen_block: Keys of a block, if each query reads chosen blocks only (None: all blocks).
    """

    longest_query: int
    key_dim: int
    value_dim: int
    needs_gradients: bool
    dtype: torch.dtype
    cache_dtype: torch.dtype
    on_cpu: bool
    score_block: int | None = None
    chosen_block: int | None = None


def paged_attend(
    q_TNK: torch.Tensor,
    pages: Pages,
    sink_N: torch.Tensor | None,
    *,
    query_lengths_B: torch.Tensor,
    key_lengths_B: torch.Tensor,
    longest_query: int,
    longest_key: int,
    window_keys: int | None,
    score_block: int | None = None,
    blocks: ChosenBlocks | None = None,
) -> AttentionOut:
    """Compute attention of packed queries to a paged cache.

    Args:
        q_TNK: Queries, packed. Their own keys and values are already in the pages.
        pages: Keys and values.
        sink_N: Sink logit of each query head, or None.
        query_lengths_B: int32 on the device, queries of each sequence; they are its last positions.
        key_lengths_B: int32 on the device, all positions of each sequence.
        longest_query: The largest query length. As a Python integer, it spares a device read before the launch.
        longest_key: The largest key length, likewise.
        window_keys: Keys that a query sees, its own included (None: all).
        score_block: Keys of a block, to request block scores. Not with a window: the first keys may be evicted.
        blocks: The blocks that each query reads, of a call without a window (None: all).

    Raises:
        ValueError: Lengths and shapes disagree, or block scores or chosen blocks are combined with a window.
    """
    value_dim = _check_paged(q_TNK.shape, pages, query_lengths_B, key_lengths_B, longest_query, longest_key)
    if score_block is not None and window_keys is not None:
        raise ValueError(f"block scores need every key, but the window has {window_keys}")
    rows = (q_TNK.shape[0], pages.keys_XPGK.shape[2])
    _check_blocks(blocks, rows, window_keys=window_keys, score_block=score_block)
    tensors = (q_TNK, pages.keys_XPGK, pages.values_XPGV, sink_N)
    need = PagedNeed(
        longest_query=longest_query,
        key_dim=q_TNK.shape[2],
        value_dim=value_dim,
        needs_gradients=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors),
        dtype=q_TNK.dtype,
        cache_dtype=pages.keys_XPGK.dtype,
        on_cpu=q_TNK.device.type == "cpu",
        score_block=score_block,
        chosen_block=None if blocks is None else blocks.size,
    )
    _, backend = PAGED_ATTENTION.choose(need)
    return backend.run(
        q_TNK,
        pages,
        sink_N,
        query_lengths_B=query_lengths_B,
        key_lengths_B=key_lengths_B,
        longest_query=longest_query,
        longest_key=longest_key,
        window_keys=window_keys,
        score_block=score_block,
        blocks=blocks,
    )


def _check_paged(
    query_shape: tuple[int, ...],
    pages: Pages,
    query_lengths_B: torch.Tensor,
    key_lengths_B: torch.Tensor,
    longest_query: int,
    longest_key: int,
) -> int:
    """Return V. Raises ValueError if lengths and the shape [T, N, K] of the queries disagree."""
    T, N, K = query_shape
    _, P, G, width = pages.values_XPGV.shape
    extra = scale_bytes(pages.keys_XPGK.dtype)
    V = width - extra
    B, Y = pages.tables_BY.shape
    shapes_fit = pages.keys_XPGK.shape[1:] == (P, G, K + extra) and N % G == 0 and B <= T <= B * longest_query
    is_int32 = query_lengths_B.dtype == key_lengths_B.dtype == torch.int32
    have_lengths = query_lengths_B.shape[0] == key_lengths_B.shape[0] == B  # `len` of a tensor takes 2 us
    if not (shapes_fit and is_int32 and have_lengths and longest_key <= Y * P):
        raise ValueError(
            f"paged attention shapes do not fit: q {tuple(query_shape)}, keys {tuple(pages.keys_XPGK.shape)}, values "
            f"{tuple(pages.values_XPGV.shape)}, tables {(B, Y)}, query lengths "
            f"{query_lengths_B.tolist()}, key lengths {key_lengths_B.tolist()} (int32, up to {longest_query} and "
            f"{longest_key})"
        )
    return V


class StoreNeed(NamedTuple):
    """The properties of one call; a backend decides from these alone whether it serves the call.

    Attributes:
        num_tokens: T.
        dtype: Dtype of the new rows.
        cache_dtype: Dtype of the pages.
        needs_gradients: Whether the new rows require gradients.
        readable: Whether the numbers of a position are contiguous in rows and pages.
        on_cpu: Whether the rows are in CPU memory.
    """

    num_tokens: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    needs_gradients: bool
    readable: bool
    on_cpu: bool


def store(pages: Pages, page_T: torch.Tensor, slot_T: torch.Tensor, k_TGK: torch.Tensor, v_TGV: torch.Tensor) -> None:
    """Write row t of keys and values to position `slot_T[t]` of page `page_T[t]`, in the dtype of the cache.

    Values beyond the range of a narrower dtype are clamped to its largest number.

    Args:
        pages: The cache of the layer. Keys and values have one dtype.
        page_T: int64 [T], page of each row.
        slot_T: int64 [T], position of each row in its page.
        k_TGK: New keys.
        v_TGV: New values, in the dtype of the keys.
    """
    keys, values = pages.keys_XPGK, pages.values_XPGV
    need = StoreNeed(
        k_TGK.shape[0],
        k_TGK.dtype,
        keys.dtype,
        k_TGK.requires_grad or v_TGV.requires_grad,
        k_TGK.stride()[1:] == keys.stride()[2:] == (k_TGK.shape[2], 1)
        and v_TGV.stride()[1:] == values.stride()[2:] == (v_TGV.shape[2], 1),
        k_TGK.is_cpu,
    )
    STORE.choose(need)[1].run(pages, page_T, slot_T, k_TGK, v_TGV)


class FreshHeads(NamedTuple):
    """The projected heads of new tokens, before rotation and scale.

    Attributes:
        joined_TJ: The query heads, the key heads and the value heads of each token, [T, (N + G) K + G V].
        num_heads: N.
        num_kv_heads: G.
        key_dim: K.
        value_dim: V.
        cos_TR: Rotation of each token, as in `openmimo.kernels.operations.apply_rotary`; None for no rotation.
        sin_TR: See there.
        value_scale: Factor of the values.
    """

    joined_TJ: torch.Tensor
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    cos_TR: torch.Tensor | None
    sin_TR: torch.Tensor | None
    value_scale: float


def rotated_heads(fresh: FreshHeads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rotated queries [T, N, K], rotated keys [T, G, K] and scaled values [T, G, V]. Differentiable."""
    T, N, G, K = len(fresh.joined_TJ), fresh.num_heads, fresh.num_kv_heads, fresh.key_dim
    queries_and_keys, values = fresh.joined_TJ.split_with_sizes([(N + G) * K, G * fresh.value_dim], dim=1)
    heads = queries_and_keys.view(T, N + G, K)
    if fresh.cos_TR is not None and fresh.sin_TR is not None:
        heads = apply_rotary(heads, fresh.cos_TR, fresh.sin_TR)
    q_TNK, k_TGK = heads.split_with_sizes([N, G], dim=1)
    v_TGV = values.view(T, G, fresh.value_dim)
    return q_TNK, k_TGK, v_TGV if fresh.value_scale == 1.0 else v_TGV * fresh.value_scale


class UpdateNeed(NamedTuple):
    """The properties of one call; a backend decides from these alone whether it serves the call.

    Attributes:
        longest_query: The largest number of queries of a sequence.
        dtype: Dtype of the heads.
        cache_dtype: Dtype of the pages.
        needs_gradients: Whether autograd records and an input requires a gradient.
        readable: Whether heads are rotated, the tables are contiguous and have the rows and dtype of the heads, and the
            numbers of a head are contiguous in heads and pages.
        on_cpu: Whether the heads are in CPU memory.
        key_dim: K.
        value_dim: V.
        score_block: Keys of a block of the requested block scores (None: no scores).
    """

    longest_query: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    needs_gradients: bool
    readable: bool
    on_cpu: bool
    key_dim: int
    value_dim: int
    score_block: int | None = None


def update_and_attend(
    fresh: FreshHeads,
    pages: Pages,
    page_T: torch.Tensor,
    slot_T: torch.Tensor,
    sink_N: torch.Tensor | None,
    *,
    query_lengths_B: torch.Tensor,
    key_lengths_B: torch.Tensor,
    longest_query: int,
    longest_key: int,
    window_keys: int | None,
    score_block: int | None = None,
) -> AttentionOut:
    """Rotate the heads of new tokens, scale their values, `store` keys and values, and `paged_attend`.

    Arguments as in these operations.

    Raises:
        ValueError: The width of the heads is not the sum of their dims, or lengths and shapes disagree.
    """
    joined, keys, values = fresh.joined_TJ, pages.keys_XPGK, pages.values_XPGV
    width = (fresh.num_heads + fresh.num_kv_heads) * fresh.key_dim + fresh.num_kv_heads * fresh.value_dim
    if joined.shape[1] != width or keys.shape[2:] != (fresh.num_kv_heads, fresh.key_dim + scale_bytes(keys.dtype)):
        raise ValueError(
            f"heads do not fit: {tuple(joined.shape)} for {fresh.num_heads} query heads and {fresh.num_kv_heads} "
            f"key/value heads of {fresh.key_dim} and {fresh.value_dim} dims, and pages of {tuple(keys.shape[2:])}"
        )
    query_shape = (joined.shape[0], fresh.num_heads, fresh.key_dim)
    _check_paged(query_shape, pages, query_lengths_B, key_lengths_B, longest_query, longest_key)
    cos, sin = fresh.cos_TR, fresh.sin_TR
    need = UpdateNeed(
        longest_query,
        joined.dtype,
        keys.dtype,
        torch.is_grad_enabled() and joined.requires_grad,
        cos is not None
        and sin is not None
        and joined.dtype == cos.dtype
        and joined.shape[0] == cos.shape[0] == sin.shape[0]
        and cos.is_contiguous()
        and sin.is_contiguous()
        and joined.stride(1) == keys.stride(3) == values.stride(3) == 1,
        joined.is_cpu,
        fresh.key_dim,
        fresh.value_dim,
        score_block,
    )
    return UPDATE.choose(need)[1].run(
        fresh,
        pages,
        page_T,
        slot_T,
        sink_N,
        query_lengths_B=query_lengths_B,
        key_lengths_B=key_lengths_B,
        longest_query=longest_query,
        longest_key=longest_key,
        window_keys=window_keys,
        score_block=score_block,
    )
