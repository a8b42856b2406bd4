"""Every backend that rotates, stores and attends does what the reference does in float64, or refuses."""

import pytest
import torch
from update_calls import CALLS, TOLERANCES, assert_is_the_reference, call_of

from openmimo.kernels.attention import UPDATE, UpdateNeed, update_and_attend

BACKENDS = dict(UPDATE.backends())


def need_of(fresh, pages, arguments, readable=True):
    return UpdateNeed(
        arguments["longest_query"],
        fresh.joined_TJ.dtype,
        pages.keys_XPGK.dtype,
        False,
        readable,
        fresh.joined_TJ.is_cpu,
        fresh.key_dim,
        fresh.value_dim,
    )


@pytest.mark.parametrize(
    "dtype, cached",
    [(dtype, dtype) for dtype in TOLERANCES] + [(dtype, torch.float8_e4m3fn) for dtype in TOLERANCES],
    ids=str,
)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.inference_mode()
def test_backend_is_the_reference_in_float64_or_refuses(backend, name, dtype, cached):
    call, arguments = call_of(name, dtype, cached)
    if reason := BACKENDS[backend].refuse(need_of(*call[:2], arguments)):
        pytest.skip(reason)
    assert_is_the_reference(BACKENDS[backend], call, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_backend_does_not_do_is_refused(backend):
    (fresh, pages, *_), arguments = call_of("decode", torch.float32, torch.float32)
    need = need_of(fresh, pages, arguments)
    refused = [
        BACKENDS[backend].refuse(need._replace(**change))
        for change in ({"score_block": 16}, {"needs_gradients": True}, {"longest_query": 99}, {"readable": False})
    ]
    assert refused == [None] * 4 if backend == "reference" else all(refused)


def test_heads_that_do_not_fit_are_refused():
    (fresh, *rest), arguments = call_of("decode", torch.float32, torch.float32)
    with pytest.raises(ValueError, match="heads do not fit"):
        update_and_attend(fresh._replace(joined_TJ=fresh.joined_TJ[:, 1:]), *rest, **arguments)
