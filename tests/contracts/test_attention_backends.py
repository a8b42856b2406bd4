"""Every attention backend computes what `reference` computes, forward and backward, or refuses.

The cases have lengths well above the window, ragged packs, cached prefixes, random sinks and poisoned memory.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend

from openmimo.core.errors import ConfigError
from openmimo.kernels.attention import ATTENTION, AttentionNeed, ChosenBlocks, attend, sdpa
from openmimo.kernels.dispatch import Dispatcher

BACKENDS = [name for name, _ in ATTENTION.backends() if name != "reference"]
NATIVE = ("native", "chosen")  # in C, without float64 and gradients

# query lengths, key lengths, query heads, key/value heads, key dim, value dim, window, sink
CALLS = {
    "window": ((300,), (300,), 8, 2, 24, 16, 9, True),
    "window of a block": ((200,), (200,), 4, 1, 48, 32, 64, True),
    "window beyond a block": ((331,), (331,), 4, 4, 24, 16, 129, True),
    "window of one": ((70,), (70,), 2, 1, 8, 12, 1, True),
    "window without sink": ((300,), (300,), 8, 8, 24, 16, 33, False),
    "packed windows": ((130, 1, 77, 64, 5, 40), (130, 1, 77, 64, 5, 40), 8, 2, 24, 16, 33, True),
    "many short documents": ((7,) * 40, (7,) * 40, 4, 2, 12, 20, 9, True),
    "full": ((300,), (300,), 8, 2, 24, 16, None, False),
    "full with sink": ((190,), (190,), 8, 1, 192, 128, None, True),
    "packed full": ((130, 1, 77, 64, 5, 40), (130, 1, 77, 64, 5, 40), 8, 2, 24, 16, None, True),
    "equal documents": ((64,) * 5, (64,) * 5, 4, 2, 24, 16, None, False),
    "full of many chunks": ((90, 700, 30), (90, 1400, 30), 4, 2, 24, 16, None, True),
    "packs after long caches": ((3, 5, 40, 2), (900, 20, 60, 1300), 4, 2, 24, 16, None, True),
    "chunk after a cache": ((150,), (420,), 8, 2, 24, 16, None, True),
    "chunk after a window": ((150,), (182,), 8, 2, 24, 16, 33, True),
    "chunks of two": ((40, 90), (72, 100), 8, 2, 24, 16, 33, True),
    "decode": ((1, 1, 1), (50, 301, 9), 8, 2, 24, 16, None, True),
    "decode a window": ((1, 1), (33, 9), 8, 2, 24, 16, 33, True),
    "verify drafts": ((4, 2), (300, 7), 8, 2, 24, 16, None, False),
    "verify drafts in a window": ((4, 4), (36, 11), 8, 2, 24, 16, 33, True),
}
# The same shapes without a causal mask: queries also attend to later keys.
BIDIRECTIONAL = {
    "documents": ((7, 30, 1, 90, 7, 7, 7, 7), (7, 30, 1, 90, 7, 7, 7, 7), 4, 2, 12, 20, None, False),
    "documents with sinks": ((7, 30, 1, 90, 7, 7, 7, 7), (7, 30, 1, 90, 7, 7, 7, 7), 4, 2, 12, 20, None, True),
    "windows": ((40,) * 9, (40,) * 9, 4, 2, 12, 20, 9, True),
    "a window": ((300,), (300,), 8, 2, 24, 16, 9, True),
    "chunks after a cache": ((3, 5) * 4, (90, 20) * 4, 4, 2, 24, 16, None, True),
}


def tensors_of(call, dtype, gradients):
    query_lengths, key_lengths, N, G, K, V, window, has_sink = call
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(gradients)

    T, S = sum(query_lengths), sum(key_lengths)
    tensors = [draw(T, N, K), draw(S, G, K), draw(S, G, V), draw(N) if has_sink else None]
    need = AttentionNeed(query_lengths, key_lengths, N, G, K, V, window, has_sink, gradients, dtype, True)
    return need, tensors


def run(name, need, tensors, scale=None):
    """Returns the output and the gradients of a backend, in order."""
    backend = dict(ATTENTION.backends())[name]
    out = backend.run(*tensors, need=need, scale=scale or need.key_dim**-0.5).out_TNV
    if not need.needs_gradients:
        return [out]
    weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, [tensor for tensor in tensors if tensor is not None], weights)]


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is allocated without being written holds NaN, so a read of it makes the comparison fail."""
    real = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
    real_new_empty = torch.Tensor.new_empty

    def fill(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    for name, function in real.items():
        monkeypatch.setattr(torch, name, lambda *args, _f=function, **kwargs: fill(_f(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: fill(real_new_empty(self, *a, **k)))


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "inference"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_is_the_reference_or_refuses(name, call, gradients, poisoned):
    need, tensors = tensors_of(CALLS[call], torch.float64, gradients)
    if dict(ATTENTION.backends())[name].refuse(need):
        pytest.skip(dict(ATTENTION.backends())[name].refuse(need))
    for ours, theirs in zip(run(name, need, tensors), run("reference", need, tensors), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("call", CALLS)
def test_triton_prompts_are_the_reference(call, poisoned):
    """In Triton's interpreter, where it is installed; see `make interpret`."""
    need, tensors = tensors_of(CALLS[call], torch.float32, False)
    if reason := dict(ATTENTION.backends())["triton_prompts"].refuse(need):
        pytest.skip(reason)
    exact = run("reference", need, [None if tensor is None else tensor.double() for tensor in tensors])[0]
    assert torch.allclose(run("triton_prompts", need, tensors)[0].double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "inference"])
@pytest.mark.parametrize("call", BIDIRECTIONAL)
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_to_later_keys_is_the_reference_or_refused(name, call, gradients, poisoned):
    need, tensors = tensors_of(BIDIRECTIONAL[call], torch.float64, gradients)
    need = replace(need, causal=False)
    if dict(ATTENTION.backends())[name].refuse(need):
        pytest.skip(dict(ATTENTION.backends())[name].refuse(need))
    for ours, theirs in zip(run(name, need, tensors), run("reference", need, tensors), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lengths", [(50, 9), (40,) * 9], ids=["reference", "short"])
@pytest.mark.parametrize("window_keys", [None, 6])
def test_attention_to_later_keys_is_the_softmax_over_them(lengths, window_keys):
    need, (q, k, v, _) = tensors_of((lengths, lengths, 4, 4, 8, 12, window_keys, False), torch.float64, False)
    out = attend(q, k, v, None, query_lengths=lengths, key_lengths=lengths, window_keys=window_keys, causal=False)
    start = sum(lengths[:-1])
    place = torch.arange(lengths[-1])
    logits = torch.einsum("tnk,snk->nts", q[start:], k[start:]) * 8**-0.5
    if window_keys is not None:
        logits = logits.masked_fill((place[:, None] - place).abs() >= window_keys, float("-inf"))
    expected = torch.einsum("nts,snv->tnv", logits.softmax(-1), v[start:])
    assert torch.allclose(out.out_TNV[start:], expected)


@pytest.mark.parametrize("lengths", [(30, 30), (30, 7)])
def test_an_accelerators_attention_to_later_keys_is_the_reference(monkeypatch, lengths):
    monkeypatch.setattr(sdpa, "PREFERRED", [SDPBackend.MATH])
    need, tensors = tensors_of((lengths, lengths, 4, 2, 12, 20, None, False), torch.float64, True)
    need = replace(need, causal=False)
    for ours, theirs in zip(run("sdpa", need, tensors), run("reference", need, tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", BACKENDS)
def test_lower_precisions_stay_close(name, call, dtype, tolerance):
    exact_need, exact = tensors_of(CALLS[call], torch.float64, False)
    need, tensors = tensors_of(CALLS[call], dtype, False)
    if dict(ATTENTION.backends())[name].refuse(need):
        pytest.skip("refused")
    expected = run("reference", exact_need, exact)[0]
    error = (run(name, need, tensors)[0].double() - expected).norm() / expected.norm()
    assert error < tolerance


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("gradients", [True, False])
def test_something_fast_serves_every_call_on_a_cpu(call, gradients):
    need, _ = tensors_of(CALLS[call], torch.float32, gradients)
    if gradients and not need.is_self_attention:
        return
    assert ATTENTION.choose(need)[0] != "reference"


@pytest.mark.parametrize("call", ["packed windows", "packed full", "decode", "many short documents"])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_scale_is_the_callers(name, call):
    need, tensors = tensors_of(CALLS[call], torch.float32, False)
    if dict(ATTENTION.backends())[name].refuse(need):
        pytest.skip("refused")
    (ours,), (theirs,) = (run(backend, need, tensors, scale=0.7) for backend in (name, "reference"))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("far", ["an early key", "a late key", "a sink"])
@pytest.mark.parametrize("name", BACKENDS)
def test_logits_that_leave_the_range_of_exp(name, far):
    """One logit differs from those of other keys by hundreds, in either direction."""
    need, tensors = tensors_of(((1300,), (1300,), 4, 2, 24, 16, None, True), torch.float64, True)
    if dict(ATTENTION.backends())[name].refuse(need):
        pytest.skip("refused")
    q, k, v, sink = (tensor.detach() for tensor in tensors)
    q[..., 0] = 60.0
    k[:, :, 0] = 0.0
    k[{"an early key": 3, "a late key": 1290, "a sink": []}[far], :, 0] = 60.0
    sink[0] = 900.0 if far == "a sink" else -900.0
    tensors = [tensor.requires_grad_() for tensor in (q, k, v, sink)]
    for ours, theirs in zip(run(name, need, tensors), run("reference", need, tensors), strict=True):
        assert torch.isfinite(ours).all()
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-9)


def test_an_accelerators_padded_batches_are_the_reference(monkeypatch):
    """On a CPU, sdpa refuses the call because torch has no fast kernel; its computation still runs and is compared."""
    monkeypatch.setattr(sdpa, "PREFERRED", [SDPBackend.MATH])
    need, tensors = tensors_of(CALLS["packed full"][:7] + (False,), torch.float64, True)
    for ours, theirs in zip(run("sdpa", need, tensors), run("reference", need, tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_long_sequences_without_a_fused_kernel_are_refused_instead_of_unfused():
    """On a CPU, torch has no cuDNN, as on an accelerator whose fused kernels refuse a call."""
    need, tensors = tensors_of(((65,), (65,), 4, 2, 12, 20, None, False), torch.float32, False)
    with pytest.raises(ConfigError, match="attention of 65 tokens with 4 query heads of 12 dims.*OPENMIMO_ATTENTION"):
        run("sdpa", need, tensors)


@pytest.mark.parametrize("call", ["packed windows", "packed full", "decode"])
def test_bfloat16_widened_to_float32_stays_close(call):
    """As on a processor without bfloat16 instructions. Elsewhere the backend refuses, but its computation runs."""
    _, exact = tensors_of(CALLS[call], torch.float64, False)
    need, tensors = tensors_of(CALLS[call], torch.bfloat16, False)
    (out,), (expected,) = run("widened", need, tensors), run("reference", replace(need, dtype=torch.float64), exact)
    assert out.dtype == torch.bfloat16 and (out.double() - expected).norm() / expected.norm() < 4e-2


def test_one_more_key_in_the_window_shows():
    need, tensors = tensors_of(CALLS["window"], torch.float64, False)
    right = run("reference", need, tensors)[0]
    wrong = run("reference", replace(need, window_keys=10), tensors)[0]
    assert (right - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("block", [1, 7, 64, 400])
@pytest.mark.parametrize(
    "call", ["full with sink", "packed full", "packed windows", "verify drafts", "packs after long caches"]
)
@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_block_scores_are_block_maxima_of_the_probabilities_or_refused(name, call, block):
    """Scores are maxima over a block's keys and a key/value head's query heads; blocks restart at each sequence."""
    dtype = torch.float32 if name in NATIVE else torch.float64
    need, (q, k, v, sink) = tensors_of(CALLS[call], dtype, name not in NATIVE)
    need = replace(need, score_block=block)
    backend = dict(ATTENTION.backends())[name]
    if reason := backend.refuse(need):
        assert name != "reference"
        pytest.skip(reason)
    out, scores = backend.run(q, k, v, sink, need=need, scale=0.3)
    assert torch.equal(out, backend.run(q, k, v, sink, need=replace(need, score_block=None), scale=0.3).out_TNV)
    assert not scores.requires_grad and scores.shape[2] == -(-max(need.key_lengths) // block)
    first_query = first_key = 0
    for queries, keys in zip(need.query_lengths, need.key_lengths, strict=True):
        for index in range(0, queries, 37):
            own = keys - queries + index
            oldest = 0 if need.window_keys is None else max(0, own - need.window_keys + 1)
            for group in range(need.num_kv_heads):
                heads = range(
                    group * need.num_heads // need.num_kv_heads, (group + 1) * need.num_heads // need.num_kv_heads
                )
                expected = torch.zeros(scores.shape[2], dtype=scores.dtype)
                for head in heads:
                    seen = k[first_key + oldest : first_key + own + 1, group] @ q[first_query + index, head] * 0.3
                    seen = seen if sink is None else torch.cat([seen, sink[head, None]])
                    for place, probability in enumerate(seen.softmax(0)[: own + 1 - oldest].tolist()):
                        column = (oldest + place) // block
                        expected[column] = max(expected[column], probability)
                exact = {"rtol": 1e-10, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
                assert torch.allclose(scores[first_query + index, group], expected, **exact)
        first_query, first_key = first_query + queries, first_key + keys


def chosen_blocks(need, size, generator):
    """Up to three blocks of each query and key/value head at random."""
    most = -(-max(need.key_lengths) // size)
    ids = torch.full((sum(need.query_lengths), need.num_kv_heads, min(3, most)), -1)
    row = 0
    for queries, keys in zip(need.query_lengths, need.key_lengths, strict=True):
        for own in range(keys - queries, keys):
            for group in range(need.num_kv_heads):
                some = torch.randperm(own // size + 1, generator=generator)[:3].sort().values
                ids[row, group, : len(some)] = some
            row += 1
    return ChosenBlocks(ids, size)


def attend_chosen(need, tensors, blocks, scale):
    """The expected output: a softmax over the keys of the chosen blocks up to the query, with a mask for each query."""
    q, k, v, sink = (None if tensor is None else tensor.double() for tensor in tensors)
    hidden = torch.full((len(q), need.num_kv_heads, len(k)), float("-inf"), dtype=torch.float64)
    row = first_key = 0
    for queries, keys in zip(need.query_lengths, need.key_lengths, strict=True):
        for own in range(keys - queries, keys):
            for group in range(need.num_kv_heads):
                for block in blocks.ids_TGJ[row, group].tolist():
                    if block >= 0:
                        stop = min((block + 1) * blocks.size, own + 1)
                        hidden[row, group, first_key + block * blocks.size : first_key + stop] = 0.0
            row += 1
        first_key += keys
    heads = need.num_heads // need.num_kv_heads
    k, v, hidden = (x.repeat_interleave(heads, 1) for x in (k, v, hidden))
    logits = torch.einsum("tnk,snk->tns", q, k) * scale + hidden
    if sink is not None:
        logits = torch.cat([logits, sink[None, :, None].expand(len(q), -1, 1)], dim=-1)
    return torch.einsum("tns,snv->tnv", logits.softmax(-1)[..., : len(k)], v)


@pytest.mark.parametrize(("size", "gradients"), [(1, False), (7, True), (64, False)])
@pytest.mark.parametrize("call", ["packed full", "chunk after a cache", "verify drafts"])
@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_chosen_blocks_are_the_only_keys_or_refused(name, call, size, gradients, poisoned):
    dims = (48, 32) if name in NATIVE else CALLS[call][4:6]
    dtype, gradients = (torch.float32, False) if name in NATIVE else (torch.float64, gradients)
    need, tensors = tensors_of((*CALLS[call][:4], *dims, *CALLS[call][6:]), dtype, gradients)
    need = replace(need, chosen_block=size)
    backend = dict(ATTENTION.backends())[name]
    if reason := backend.refuse(need):
        assert name != "reference"
        pytest.skip(reason)
    blocks = chosen_blocks(need, size, torch.Generator().manual_seed(1))
    out = backend.run(*tensors, need=need, scale=0.3, blocks=blocks).out_TNV
    expected = attend_chosen(need, tensors, blocks, 0.3)
    assert torch.allclose(out.double(), expected, atol=1e-10 if dtype == torch.float64 else 2e-6)
    if gradients:
        weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
        inputs = [tensor for tensor in tensors if tensor is not None]
        ours, theirs = (torch.autograd.grad(result, inputs, weights) for result in (out, expected))
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)


def test_chosen_blocks_with_a_window_or_later_keys_are_refused():
    q, k, v = torch.randn(20, 2, 8), torch.randn(20, 1, 8), torch.randn(20, 1, 8)
    lengths = {"query_lengths": (20,), "key_lengths": (20,)}
    blocks = ChosenBlocks(torch.zeros(20, 1, 1, dtype=torch.int64), 4)
    for options in (
        {"window_keys": 4},
        {"window_keys": None, "causal": False},
        {"window_keys": None, "score_block": 4},
    ):
        with pytest.raises(ValueError, match="chosen blocks need a causal call without a window"):
            attend(q, k, v, None, **lengths, **options, blocks=blocks)
    with pytest.raises(ValueError, match="blocks are chosen for"):
        attend(q, k, v, None, **lengths, window_keys=None, blocks=ChosenBlocks(blocks.ids_TGJ[:4], 4))


def test_a_forced_backend_that_refuses_says_why(monkeypatch):
    monkeypatch.setenv("OPENMIMO_ATTENTION", "packed_rows")
    fresh = Dispatcher("openmimo.kernels.attention", "OPENMIMO_ATTENTION")
    monkeypatch.setattr("openmimo.kernels.attention.ATTENTION", fresh)
    q, k, v = torch.randn(20, 2, 8), torch.randn(20, 1, 8), torch.randn(20, 1, 8)
    with pytest.raises(ConfigError, match="packed_rows"):
        attend(q, k, v, None, query_lengths=(20,), key_lengths=(20,), window_keys=4)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = torch.randn(20, 2, 8), torch.randn(20, 1, 8), torch.randn(20, 1, 8)
    with pytest.raises(ValueError, match="shapes do not fit"):
        attend(q, k, v, None, query_lengths=(19,), key_lengths=(20,), window_keys=None)


def test_kernels_of_prompts_refuse_chosen_blocks_and_scores():
    """Their other refusals come after these, so that the test says something on a machine without an accelerator."""
    need, _ = tensors_of(CALLS[next(iter(CALLS))], torch.float32, False)
    backend = dict(ATTENTION.backends())["triton_prompts"]
    assert "blocks" in backend.refuse(replace(need, window_keys=None, chosen_block=4))
    assert "scores" in backend.refuse(replace(need, window_keys=None, score_block=4))
