"""Every backend that stores keys and values writes the rows to their positions only, or refuses."""

import math

import pytest
import torch

from openmimo.kernels import native
from openmimo.kernels.attention import STORE, Pages, StoreNeed, store

BACKENDS = dict(STORE.backends())
TOKENS = (1, 7, 64, 100)


def call_of(tokens, dtype, stored):
    """The arguments of one call, and the expected memory after it.

    The pages have gaps between them. The keys are slices of wider rows, as in the model.
    """
    generator = torch.Generator().manual_seed(0)
    joined = torch.randn(tokens, 5 * 48, generator=generator).to(dtype)
    k, v = joined.view(tokens, 5, 48)[:, 3:], torch.randn(tokens, 2, 32, generator=generator).to(dtype)
    memory = torch.full((40, 2000), math.nan).to(stored)
    keys = memory.as_strided((40, 8, 2, 48), (2000, 96, 48, 1), 0)
    values = memory.as_strided((40, 8, 2, 32), (2000, 64, 32, 1), 8 * 96)
    places = torch.randperm(320, generator=generator)[:tokens]
    expected = memory.clone()
    expected.as_strided(keys.shape, keys.stride(), 0)[places // 8, places % 8] = k.to(stored)
    expected.as_strided(values.shape, values.stride(), 8 * 96)[places // 8, places % 8] = v.to(stored)
    pages = Pages(keys, values, torch.zeros(1, 1, dtype=torch.int32))
    return memory, expected, (pages, places // 8, places % 8, k, v)


def assert_same(memory, expected):
    assert torch.equal(memory.float().nan_to_num(-7.0), expected.float().nan_to_num(-7.0))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", BACKENDS)
@torch.inference_mode()
def test_rows_are_stored_where_they_belong_and_nowhere_else(name, tokens, stored):
    dtype = torch.float32 if stored == torch.float32 else torch.bfloat16
    if reason := BACKENDS[name].refuse(StoreNeed(tokens, dtype, stored, False, True, True)):
        pytest.skip(reason)
    memory, expected, call = call_of(tokens, dtype, stored)
    BACKENDS[name].run(*call)
    assert_same(memory, expected)


@pytest.mark.parametrize("name", BACKENDS)
@torch.inference_mode()
def test_a_narrower_cache_saturates(name):
    if reason := BACKENDS[name].refuse(StoreNeed(1, torch.float32, torch.float8_e4m3fn, False, True, True)):
        pytest.skip(reason)
    keys, values = (torch.zeros(1, 1, 1, 2).to(torch.float8_e4m3fn) for _ in range(2))
    rows, place = torch.tensor([[[1e9, -1e9]]]), torch.zeros(1, dtype=torch.int64)
    BACKENDS[name].run(Pages(keys, values, torch.zeros(1, 1, dtype=torch.int32)), place, place, rows, rows)
    assert keys.float().tolist() == values.float().tolist() == [[[[448.0, -448.0]]]]


@torch.inference_mode()
def test_rows_that_are_not_contiguous_are_stored_too():
    memory, expected, (pages, page, slot, k, v) = call_of(7, torch.float32, torch.float32)
    store(pages, page, slot, k.transpose(1, 2).contiguous().transpose(1, 2), v)
    assert_same(memory, expected)


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
def test_a_few_rows_on_a_cpu_are_native():
    assert STORE.choose(StoreNeed(4, torch.bfloat16, torch.bfloat16, False, True, True))[0] == "native"
