"""Every paged backend computes what float64 attention over gathered keys computes.

The cases have shuffled and shared pages, ragged batches, verification, windows, sinks, NaN in all unwritten positions,
and lengths well above window and block.
"""

import math

import pytest
import torch

from openmimo.kernels import native
from openmimo.kernels.attention import PAGED_ATTENTION, ChosenBlocks, PagedNeed, Pages, attend, paged_attend

BACKENDS = [name for name, _ in PAGED_ATTENTION.backends()]
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# query lengths, key lengths, query heads, key/value heads, key dim, value dim, page positions, window, sink
CALLS = {
    "one": ((1,), (1,), 4, 2, 48, 32, 16, None, False),
    "decode": ((1, 1, 1), (50, 301, 9), 8, 2, 48, 32, 16, None, True),
    "window": ((1, 1), (300, 9), 8, 2, 48, 32, 5, 33, True),
    "verify": ((4, 2, 16), (300, 7, 64), 8, 2, 48, 32, 16, None, False),
    "verify in a window": ((4, 4, 16), (200, 11, 90), 16, 4, 192, 128, 7, 33, True),
    "many heads": ((3, 1), (130, 77), 64, 4, 192, 128, 64, 129, True),
    "window of one": ((1, 3), (20, 40), 4, 1, 16, 32, 3, 1, True),
    "long": ((1, 2, 1), (1200, 700, 30), 4, 2, 48, 32, 16, None, True),
    "parts of two sizes": ((2,), (2700,), 4, 1, 16, 16, 64, None, False),
    "a window of several parts": ((2, 1), (1500, 90), 4, 1, 16, 16, 32, 700, True),
    "odd dims": ((2, 1), (70, 20), 4, 2, 35, 17, 16, None, True),
}


def call_of(name, dtype, seed=0):
    """Queries, pages with NaN in all unused positions, the sink, and the arguments of one call."""
    query_lengths, key_lengths, N, G, K, V, P, window, has_sink = CALLS[name]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    counts = [-(-length // P) for length in key_lengths]
    keys, values = (torch.full((sum(counts) + 3, P, G, dim), math.nan, dtype=dtype) for dim in (K, V))
    order = torch.randperm(len(keys), generator=generator)
    tables = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
    used = 0
    for row, (queries, length) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        tables[row, : counts[row]] = order[used : used + counts[row]]
        used += counts[row]
        first = 0 if window is None else max(0, length - queries - window + 1)
        for position in range(first, length):
            keys[tables[row, position // P], position % P] = draw(G, K)
            values[tables[row, position // P], position % P] = draw(G, V)
        tables[row, : first // P] = -1  # freed: the window has passed them
    sink = draw(N).float() if has_sink else None
    arguments = {"query_lengths": query_lengths, "key_lengths": key_lengths, "window_keys": window}
    return draw(sum(query_lengths), N, K), Pages(keys, values, tables), sink, arguments


def int32(*lengths):
    return torch.tensor(lengths, dtype=torch.int32)


def tensors_of(arguments):
    """The tensor arguments of a backend."""
    return {
        "query_lengths_B": int32(*arguments["query_lengths"]),
        "key_lengths_B": int32(*arguments["key_lengths"]),
        "longest_query": max(arguments["query_lengths"]),
        "longest_key": max(arguments["key_lengths"]),
        "window_keys": arguments["window_keys"],
    }


def attend_by_length(q, pages, sink, arguments, **options):
    return paged_attend(q, pages, sink, **tensors_of(arguments), **options)


def exact_output(q, pages, sink, *, query_lengths, key_lengths, window_keys):
    """The expected output, computed row by row in float64."""
    rows, first_query = [], 0
    P = pages.keys_XPGK.shape[1]
    for sequence, (queries, length) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        for index in range(queries):
            own = length - queries + index
            first = 0 if window_keys is None else max(0, own - window_keys + 1)
            places = [(int(pages.tables_BY[sequence, p // P]), p % P) for p in range(first, own + 1)]
            k, v = (torch.stack([x[place] for place in places]).double() for x in pages[:2])
            heads = q.shape[1] // k.shape[1]
            query = q[first_query + index].double()
            k, v = k.repeat_interleave(heads, dim=1), v.repeat_interleave(heads, dim=1)
            logits = torch.einsum("nk,snk->ns", query, k) / math.sqrt(q.shape[2])
            if sink is not None:
                logits = torch.cat([logits, sink.double()[:, None]], dim=1)
            weights = logits.softmax(dim=1)[:, : len(places)]
            rows.append(torch.einsum("ns,snv->nv", weights, v))
        first_query += queries
    return torch.stack(rows)


def need_of(q, pages, query_lengths):
    _, _, _, value_dim = pages.values_XPGV.shape
    return PagedNeed(max(query_lengths), q.shape[2], value_dim, False, q.dtype, pages.keys_XPGK.dtype, True)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.inference_mode()
def test_backend_is_float64_or_refuses(backend, name, dtype):
    q, pages, sink, arguments = call_of(name, dtype)
    chosen = dict(PAGED_ATTENTION.backends())[backend]
    if reason := chosen.refuse(need_of(q, pages, arguments["query_lengths"])):
        pytest.skip(reason)
    out = chosen.run(q, pages, sink, **tensors_of(arguments)).out_TNV
    exact = exact_output(q, pages, sink, **arguments)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() / exact.norm() < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["window", "verify in a window", "long", "odd dims"])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.inference_mode()
def test_a_float8_cache_is_read_as_its_values_or_refused(backend, name, dtype):
    q, pages, sink, arguments = call_of(name, dtype)
    small = Pages(*(x.to(torch.float8_e4m3fn) for x in pages[:2]), pages.tables_BY)
    chosen = dict(PAGED_ATTENTION.backends())[backend]
    if reason := chosen.refuse(need_of(q, small, arguments["query_lengths"])):
        pytest.skip(reason)
    exact = exact_output(q, Pages(*(x.double() for x in small[:2]), small.tables_BY), sink, **arguments)
    out = chosen.run(q, small, sink, **tensors_of(arguments)).out_TNV
    assert (out.double() - exact).norm() / exact.norm() < TOLERANCES[dtype]


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(dtype):
    q, pages, sink, arguments = call_of("verify in a window", dtype)
    together, start = attend_by_length(q, pages, sink, arguments).out_TNV, 0
    for row, (queries, keys) in enumerate(zip(arguments["query_lengths"], arguments["key_lengths"], strict=True)):
        own = Pages(pages.keys_XPGK, pages.values_XPGV, pages.tables_BY[row : row + 1])
        for index in range(queries):
            rows = slice(start + index, start + index + 1)
            one = {"query_lengths": (1,), "key_lengths": (keys - queries + index + 1,), "window_keys": 33}
            alone = attend_by_length(q[rows], own, sink, one).out_TNV
            assert torch.equal(alone, together[rows])
        start += queries


@pytest.mark.parametrize("backend", BACKENDS)
@torch.inference_mode()
def test_block_scores_are_those_of_packed_attention_or_refused(backend):
    q, pages, sink, arguments = call_of("verify", torch.float32)
    need = need_of(q, pages, arguments["query_lengths"])._replace(score_block=24)
    chosen = dict(PAGED_ATTENTION.backends())[backend]
    if reason := chosen.refuse(need):
        assert backend != "reference" and "block scores" in reason
        return
    found = chosen.run(q, pages, sink, **tensors_of(arguments), score_block=24)
    assert torch.allclose(found.out_TNV, chosen.run(q, pages, sink, **tensors_of(arguments)).out_TNV, atol=1e-6)
    rows = [
        [(int(table[p // 16]), p % 16) for p in range(length)]
        for table, length in zip(pages.tables_BY, arguments["key_lengths"], strict=True)
    ]
    k, v = (torch.stack([x[place] for places in rows for place in places]) for x in pages[:2])
    expected = attend(q, k, v, sink, **arguments, score_block=24)
    assert found.block_scores_TGC.shape == (22, 2, 13)
    assert torch.allclose(found.block_scores_TGC, expected.block_scores_TGC, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1, torch.float32), (8, torch.float32), (24, torch.float32), (64, torch.float32), (64, torch.bfloat16)],
)
@pytest.mark.parametrize("name", ["decode", "verify"])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.inference_mode()
def test_chosen_blocks_are_read_from_the_pages_or_refused(backend, name, size, dtype):
    """Blocks smaller and larger than a page, and such that share no grid with it, against attention to packed keys."""
    q, pages, sink, arguments = call_of(name, dtype)
    need = need_of(q, pages, arguments["query_lengths"])._replace(chosen_block=size)
    chosen = dict(PAGED_ATTENTION.backends())[backend]
    if reason := chosen.refuse(need):
        assert backend != "reference"
        pytest.skip(reason)
    generator, rows = torch.Generator().manual_seed(1), []
    for queries, keys in zip(arguments["query_lengths"], arguments["key_lengths"], strict=True):
        for own in range(keys - queries, keys):
            for _ in range(2):  # key/value heads
                some = torch.randperm(own // size + 1, generator=generator)[:3].sort().values
                rows.append(torch.nn.functional.pad(some, (0, 3 - len(some)), value=-1))
    ids_TGJ = torch.stack(rows).view(len(q), -1, 3)[:, : pages.keys_XPGK.shape[2]]
    blocks = ChosenBlocks(ids_TGJ.contiguous(), size)
    found = chosen.run(q, pages, sink, **tensors_of(arguments), blocks=blocks).out_TNV
    places = [
        (int(table[p // pages.keys_XPGK.shape[1]]), p % pages.keys_XPGK.shape[1])
        for table, length in zip(pages.tables_BY, arguments["key_lengths"], strict=True)
        for p in range(length)
    ]
    k, v = (torch.stack([x[place] for place in places]) for x in pages[:2])
    if backend == "native":
        assert torch.equal(found, attend(q, k, v, sink, **arguments, blocks=blocks).out_TNV)
    k, v = k.double(), v.double()
    expected = attend(q.double(), k, v, None if sink is None else sink.double(), **arguments, blocks=blocks).out_TNV
    assert (found.double() - expected).norm() / expected.norm() < TOLERANCES[dtype]


def test_block_scores_with_a_window_are_refused():
    q, pages, sink, arguments = call_of("window", torch.float32)
    with pytest.raises(ValueError, match="block scores need every key"):
        attend_by_length(q, pages, sink, arguments, score_block=16)


def test_lengths_that_do_not_fit_are_refused():
    q, pages, sink, arguments = call_of("decode", torch.float32)
    for wrong in ({"query_lengths": (1, 1)}, {"key_lengths": (50, 3000, 9)}):
        with pytest.raises(ValueError, match="do not fit"):
            attend_by_length(q, pages, sink, {**arguments, **wrong})
