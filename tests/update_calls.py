"""Calls of `kernels.attention.update_and_attend` for the tests of its backends, on a CPU and on an accelerator.

Pages are shuffled and hold NaN in all unwritten positions. Each sequence has older keys in its pages.
"""

import math

import torch

from openmimo.kernels.attention import UPDATE, FreshHeads, Pages
from openmimo.kernels.operations import rotary_table

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# query lengths, key lengths, query heads, key/value heads, key dim, value dim, rotary dim, page positions, window, sink
CALLS = {
    "decode in a window": ((1, 1), (300, 9), 8, 2, 48, 32, 16, 16, 33, True),
    "verify in a window": ((4, 1, 8), (200, 1, 90), 16, 2, 192, 128, 64, 32, 33, True),
    "all dims rotated": ((2, 3), (20, 40), 4, 1, 16, 32, 16, 3, 7, False),
    "decode": ((1, 1, 1), (50, 301, 1), 8, 2, 48, 32, 16, 16, None, False),
    "verify": ((4, 2, 12), (300, 7, 64), 8, 2, 48, 32, 32, 64, None, True),
    "a long window": ((3, 1), (700, 30), 4, 2, 24, 16, 8, 32, 600, True),
}


def call_of(name, dtype, cached, scale=0.7):
    """The heads, the pages, and the other arguments of one call; the second sequence has a token without a page."""
    query_lengths, key_lengths, N, G, K, V, R, P, window, has_sink = CALLS[name]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    counts = [-(-length // P) for length in key_lengths]
    keys, values = (torch.full((sum(counts) + 2, P, G, dim), math.nan).to(cached) for dim in (K, V))
    order = torch.randperm(len(keys), generator=generator)
    tables = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
    used, pages, slots, positions = 0, [], [], []
    for row, (queries, length) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        tables[row, : counts[row]] = order[used : used + counts[row]]
        used += counts[row]
        old = length - queries
        for position in range(0 if window is None else max(0, old - window + 1), old):
            keys[tables[row, position // P], position % P] = draw(G, K).to(cached)
            values[tables[row, position // P], position % P] = draw(G, V).to(cached)
        positions += range(old, length)
        pages += [int(tables[row, position // P]) for position in range(old, length)]
        slots += [position % P for position in range(old, length)]
    cos, sin = rotary_table(torch.tensor(positions), R, 1e4, dtype)
    joined = draw(len(positions), (N + G) * K + G * V + 5)[:, : (N + G) * K + G * V]
    fresh = FreshHeads(joined, N, G, K, V, cos, sin, scale)
    arguments = {
        "query_lengths_B": torch.tensor(query_lengths, dtype=torch.int32),
        "key_lengths_B": torch.tensor(key_lengths, dtype=torch.int32),
        "longest_query": max(query_lengths),
        "longest_key": max(key_lengths),
        "window_keys": window,
    }
    sink = 3 * draw(N).float() if has_sink else None
    return (fresh, Pages(keys, values, tables), torch.tensor(pages), torch.tensor(slots), sink), arguments


def widened(call):
    """The same call in float64, with its own pages."""
    fresh, pages, *rest = call
    fresh = fresh._replace(
        joined_TJ=fresh.joined_TJ.double(), cos_TR=fresh.cos_TR.double(), sin_TR=fresh.sin_TR.double()
    )
    return fresh, Pages(pages.keys_XPGK.double(), pages.values_XPGV.double(), pages.tables_BY), *rest


def without_store(call):
    """A call whose keys and values are stored elsewhere: the attention reads the pages as they are."""
    fresh, pages, page_T, slot_T, sink = call
    old = pages.keys_XPGK, pages.values_XPGV
    N, G, K = fresh.num_heads, fresh.num_kv_heads, fresh.key_dim
    half = fresh.cos_TR.shape[1] // 2
    joined = fresh.joined_TJ.clone()
    k = old[0][page_T, slot_T].clone()  # rotated back, so that the store writes what the pages hold
    c, s = fresh.cos_TR[:, None, :half], fresh.sin_TR[:, None, :half]
    first, second = k[..., :half].clone(), k[..., half : 2 * half].clone()
    k[..., :half], k[..., half : 2 * half] = first * c + second * s, second * c - first * s
    norm = c.square() + s.square()  # of tables in 16 bits, not quite 1
    k[..., :half] /= norm
    k[..., half : 2 * half] /= norm
    joined[:, N * K : (N + G) * K] = k.flatten(1)
    joined[:, (N + G) * K :] = old[1][page_T, slot_T].flatten(1) / fresh.value_scale
    return fresh._replace(joined_TJ=joined), pages, page_T, slot_T, sink


def assert_is_the_reference(backend, call, arguments):
    """Compares what a backend stores and returns with the reference in float64."""
    fresh, pages, *_ = call
    dtype, reference = fresh.joined_TJ.dtype, dict(UPDATE.backends())["reference"]
    wide = widened(call)
    reference.run(*wide, **arguments)
    out = backend.run(*call, **arguments).out_TNV
    stored, exact_stored = (torch.cat([x.double().flatten() for x in held[:2]]) for held in (pages, wide[1]))
    assert torch.equal(stored.isnan(), exact_stored.isnan())  # every new row is written, and no other
    known = ~stored.isnan()
    limit = 0.1 if pages.keys_XPGK.dtype == torch.float8_e4m3fn else 2 * TOLERANCES[dtype]
    assert (stored - exact_stored)[known].norm() / exact_stored[known].norm() < limit
    again = (wide[0], Pages(*(x.double() for x in pages[:2]), pages.tables_BY), *wide[2:])
    exact = reference.run(*without_store(again), **arguments).out_TNV
    assert out.dtype == dtype
    assert (out.double() - exact).norm() / exact.norm() < TOLERANCES[dtype]
