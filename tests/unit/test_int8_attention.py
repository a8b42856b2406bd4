"""Attention in integers against float64, and the int8 cache: errors, exactness, sinks, zeros, and what is refused.

The error table is an independent computation with NumPy (64 dims; normal inputs, and uniform ones around 0).
"""

import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config, tiny_model

from openmimo.core.errors import ConfigError
from openmimo.core.records import Request, SamplingParams
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.worker import why_no_graphs
from openmimo.kernels import native
from openmimo.kernels.attention import ATTENTION, AttentionNeed, attend, read_rows, write_rows
from openmimo.kernels.attention._integers import IntegerSettings, attend_in_integers, quantize

needs_compiler = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
HALF, FULL = IntegerSettings(values="half"), IntegerSettings()


def draw(T, S, *, heads=1, kv_heads=1, dims=(64, 64), kind="normal", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, heads, dims[0]), (S, kv_heads, dims[0]), (S, kv_heads, dims[1]))
    if kind == "uniform":
        return tuple(torch.rand(shape, generator=generator) - 0.5 for shape in shapes)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    if kind == "biased":
        k = k + 10 * torch.randn(dims[0], generator=generator)
    return q, k, v


def exact(q, k, v, sink=None, *, causal=False, scale=None):
    """The output and the logarithm of the denominator in float64."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = torch.einsum("tnk,snk->tns", q, k) * (scale or q.shape[2] ** -0.5)
    if causal:
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        logits = logits.masked_fill(hidden[:, None], float("-inf"))
    if sink is not None:
        logits = torch.cat([logits, sink.double()[None, :, None].expand(len(q), -1, 1)], -1)
    return torch.einsum("tns,snv->tnv", logits.softmax(-1)[..., : len(k)], v), logits.logsumexp(-1)


def in_integers(q, k, v, settings=FULL, *, sink=None, causal=False, tile_keys=1024):
    return attend_in_integers(
        q, k, v, sink, scale=q.shape[2] ** -0.5, causal=causal, settings=settings, tile_keys=tile_keys
    )


def relative_error(found, expected):
    return ((found.double() - expected).abs().sum() / expected.abs().sum()).item()


def in_fp8(q, k, v, dtype):
    """Queries, keys, values and probabilities rounded to FP8, without scales, as in the paper's comparison."""
    q, k, v = (x.to(dtype).double() for x in (q, k, v))
    logits = torch.einsum("tnk,snk->tns", q, k) * q.shape[2] ** -0.5
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    rounded = weights.float().to(dtype).double()
    return torch.einsum("tns,snv->tnv", rounded, v) / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "keys", "half", "full", "tensor", "e4m3", "e5m2"),
    [
        ("normal", 1024, 0.0081, 0.0226, 0.0246, 0.0516, 0.103),
        pytest.param("normal", 4096, 0.0084, 0.0346, 0.0367, 0.0549, 0.109, marks=pytest.mark.slow),
        ("uniform", 1024, 0.0004, 0.0042, 0.0042, 0.0338, 0.0639),
        pytest.param("uniform", 4096, 0.0005, 0.0048, 0.0048, 0.0394, 0.0836, marks=pytest.mark.slow),
    ],
)
def test_errors_are_those_of_the_table(kind, keys, half, full, tensor, e4m3, e5m2):
    q, k, v = draw(256, keys, kind=kind)
    expected = exact(q, k, v)[0]
    found = {
        "half": in_integers(q, k, v, replace(HALF, smooth_keys=False))[0],
        "full": in_integers(q, k, v, replace(FULL, smooth_keys=False))[0],
        "tensor": in_integers(q, k, v, replace(FULL, smooth_keys=False, rows=False))[0],
        "e4m3": in_fp8(q, k, v, torch.float8_e4m3fn),
        "e5m2": in_fp8(q, k, v, torch.float8_e5m2),
    }
    table = {"half": half, "full": full, "tensor": tensor, "e4m3": e4m3, "e5m2": e5m2}
    for name, output in found.items():
        assert 0.6 * table[name] < relative_error(output, expected) < 1.5 * table[name], name


def test_smoothing_removes_the_error_of_a_channel_bias():
    q, k, v = draw(256, 1024, kind="biased")
    expected = exact(q, k, v)[0]
    plain, smooth = (in_integers(q, k, v, replace(HALF, smooth_keys=on))[0] for on in (False, True))
    assert relative_error(smooth, expected) < 0.012
    assert relative_error(plain, expected) > 5 * relative_error(smooth, expected)


@pytest.mark.parametrize("values", ["full", "half"])
def test_the_logarithm_of_the_denominator_is_corrected_for_smoothing(values):
    q, k, v = draw(50, 300, heads=4, kv_heads=2, dims=(48, 32), kind="biased")
    sink = torch.randn(4, generator=torch.Generator().manual_seed(2))
    for causal in (True, False):
        _, denominators = in_integers(q, k, v, IntegerSettings(values), sink=sink, causal=causal)
        error = (denominators.double() - exact(q, k, v, sink, causal=causal)[1]).abs().max()
        assert error < (0.01 if values == "half" else 0.4)  # the product with the mean key is up to 40


@pytest.mark.parametrize("tile_keys", [1, 7, 64, 1000])
def test_tiles_change_no_bit(tile_keys):
    q, k, v = draw(40, 333, heads=4, kv_heads=2, dims=(192, 128), kind="biased")
    whole = in_integers(q, k, v, causal=True)
    tiled = in_integers(q, k, v, causal=True, tile_keys=tile_keys)
    assert torch.equal(whole[0], tiled[0]) and torch.equal(whole[1], tiled[1])


def test_weights_of_a_row_sum_to_one_in_the_convention_in_use():
    q, k, _ = draw(64, 700)
    ones = torch.ones(700, 1, 64)
    assert torch.allclose(in_integers(q, k, ones)[0], torch.ones(64, 1, 64), rtol=0, atol=1e-6)
    other = in_integers(q, k, ones, replace(FULL, sum_codes=False))[0]
    assert (other - 1).abs().max() > 1e-3  # the sum of the exact probabilities is another number
    assert (other - 1).abs().max() < 0.1


def test_sums_of_the_largest_codes_are_exact():
    """The bound of a query and a key is below 2^24, and that of a block of the C kernel below 2^31."""
    dims = (1 << 24) // 127**2
    assert dims * 255 * 127 < 2**31 and 256 * 127 * 127 < 2**31
    q = torch.ones(1, 1, dims)
    codes = quantize(q)
    assert torch.equal(codes.codes @ codes.codes.mT, torch.full((1, 1, 1), 127.0**2 * dims))
    with pytest.raises(ConfigError, match="more than 1040 products"):
        need = need_of(q[..., :1].expand(1, 1, dims + 1), q, q)
        raise ConfigError(dict(ATTENTION.backends())["int8"].refuse(need))


def need_of(q, k, v, *, integers="full", causal=True, sink=None, lengths=None, **changes):
    query_lengths, key_lengths = lengths or ((len(q),), (len(k),))
    sizes = (*q.shape[1:2], *k.shape[1:2], q.shape[2], v.shape[2])
    need = AttentionNeed(query_lengths, key_lengths, *sizes, None, sink is not None, False, q.dtype, True)
    return replace(need, integers=integers, causal=causal, **changes)


BACKENDS = ["int8", pytest.param("int8_native", marks=needs_compiler)]
# query lengths, key lengths, query heads, key/value heads, key dim, value dim, sink
CALLS = {
    "192/128": ((150,), (150,), 8, 2, 192, 128, True),
    "dims of no whole words": ((70,), (70,), 2, 1, 30, 20, False),
    "pack": ((40, 100, 17), (40, 100, 17), 4, 4, 48, 32, True),
    "chunks after a cache": ((30, 20), (300, 41), 4, 1, 64, 64, False),
    "more than a block of keys": ((700,), (700,), 2, 1, 64, 64, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("integers", ["half", "full"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_are_near_float64(backend, call, integers, dtype):
    query_lengths, key_lengths, N, G, K, V, has_sink = CALLS[call]
    q, k, v = (x.to(dtype) for x in draw(sum(query_lengths), sum(key_lengths), heads=N, kv_heads=G, dims=(K, V)))
    sink = torch.randn(N, generator=torch.Generator().manual_seed(1)) if has_sink else None
    need = need_of(q, k, v, integers=integers, sink=sink, lengths=(query_lengths, key_lengths))
    chosen = dict(ATTENTION.backends())[backend]
    assert chosen.refuse(need) is None
    found = chosen.run(q, k, v, sink, need=need, scale=K**-0.5).out_TNV
    assert found.dtype == dtype
    parts = zip(q.split(query_lengths), k.split(key_lengths), v.split(key_lengths), strict=True)
    expected = torch.cat([exact(*part, sink, causal=True)[0] for part in parts])
    # the values of a short sequence have larger errors, because few of them are averaged
    assert relative_error(found, expected) < {"half": 0.012, "full": 0.035}[integers]


@needs_compiler
@pytest.mark.parametrize("integers", ["half", "full"])
def test_a_sequence_has_the_same_bits_in_c_alone_and_in_a_batch(integers):
    q, k, v = draw(157, 157, heads=4, kv_heads=2, dims=(48, 32))
    lengths = (40, 100, 17)
    need = need_of(q, k, v, integers=integers, lengths=(lengths, lengths))
    run = dict(ATTENTION.backends())["int8_native"].run
    together = run(q, k, v, None, need=need, scale=0.2).out_TNV
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), lengths, strict=True)
    for found, (q, k, v, length) in zip(together.split(lengths), parts, strict=True):
        alone = run(q, k, v, None, need=replace(need, query_lengths=(length,), key_lengths=(length,)), scale=0.2)
        assert torch.equal(found, alone.out_TNV)


@pytest.mark.parametrize("integers", ["half", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_late_queries_keep_the_keys_before_the_diagonal(backend, integers):
    """Late queries have their largest logits at early keys, which a running maximum that restarts later would lose."""
    q, k, v = draw(900, 900, dims=(64, 64))
    direction = torch.nn.functional.normalize(torch.ones(64), dim=0)
    q[400:] += 12 * direction
    k[:100] += 5 * direction
    need = need_of(q, k, v, integers=integers)
    found = dict(ATTENTION.backends())[backend].run(q, k, v, None, need=need, scale=0.125).out_TNV
    expected = exact(q, k, v, causal=True)[0]
    assert relative_error(found[400:], expected[400:]) < 0.1
    without_early = exact(q[400:], k[256:], v[256:], causal=True)[0]
    assert relative_error(without_early, expected[400:]) > 0.5


@pytest.mark.parametrize("integers", ["half", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_give_no_nan(backend, integers):
    q, k, v = draw(60, 60, heads=2, kv_heads=1)
    run = dict(ATTENTION.backends())[backend].run
    need = need_of(q, k, v, integers=integers)
    for zeros in ((q,), (k,), (v,), (q, k, v)):
        inputs = [torch.zeros_like(x) if any(x is zero for zero in zeros) else x for x in (q, k, v)]
        found = run(*inputs, None, need=need, scale=0.125).out_TNV
        assert (found - exact(*inputs, causal=True)[0]).abs().max() < 0.1
    q[3], k[5], v[7] = 0, 0, 0
    assert relative_error(run(q, k, v, None, need=need, scale=0.125).out_TNV, exact(q, k, v, causal=True)[0]) < 0.04


def test_only_calls_that_allow_integers_get_them_and_training_is_refused():
    q, k, v = draw(40, 40)
    lengths = {"query_lengths": (40,), "key_lengths": (40,)}
    plain = attend(q, k, v, None, **lengths, window_keys=None).out_TNV
    assert relative_error(plain, exact(q, k, v, causal=True)[0]) < 1e-5
    allowed = attend(q, k, v, None, **lengths, window_keys=None, integers="full").out_TNV
    assert 1e-3 < relative_error(allowed, exact(q, k, v, causal=True)[0]) < 0.05
    window = attend(q, k, v, None, **lengths, window_keys=9).out_TNV
    assert torch.equal(attend(q, k, v, None, **lengths, window_keys=9, integers="full").out_TNV, window)
    with pytest.raises(ConfigError, match="integers='full' is for inference"):
        attend(q.requires_grad_(), k, v, None, **lengths, window_keys=None, integers="full")
    for name in ("int8", "int8_native"):
        refuse = dict(ATTENTION.backends())[name].refuse
        assert "is for inference" in refuse(need_of(q, k, v, needs_gradients=True))
        assert "does not allow" in refuse(need_of(q, k, v, integers=None))
        assert "block" in refuse(need_of(q, k, v, score_block=8))


def test_attention_to_later_keys_in_integers():
    q, k, v = draw(60, 60, heads=2, kv_heads=1)
    lengths = {"query_lengths": (60,), "key_lengths": (60,)}
    found = attend(q, k, v, None, **lengths, window_keys=None, causal=False, integers="half").out_TNV
    assert relative_error(found, exact(q, k, v)[0]) < 0.012


def test_rows_of_the_cache_hold_their_scale():
    x = torch.randn(5, 3, 24, generator=torch.Generator().manual_seed(0))
    x[2, 1] = 0
    x[3] *= 1e4
    rows = write_rows(x)
    assert rows.dtype == torch.int8 and rows.shape == (5, 3, 28)
    largest = x.abs().amax(-1, keepdim=True)
    assert ((read_rows(rows, torch.float32) - x).abs() <= largest / 254 * 1.001).all()
    assert torch.equal(read_rows(rows[:1, :1], torch.float64), read_rows(rows, torch.float64)[:1, :1])


def run_engine(model, prompts, **settings):
    engine = Engine(model, config=EngineConfig(cache_gigabytes=0.002, **settings))
    params = SamplingParams(max_tokens=16, temperature=0.0, logprobs=True, ignore_eos=True)
    sequences = [engine.submit(Request(str(n), tuple(prompt), params)) for n, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    return engine, [sequence.completion() for sequence in sequences]


def prompts_of(*lengths):
    return [
        torch.randint(0, 160, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in lengths
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_dtype": "int8"},
        {"attention": "int8"},
        {"attention": "int8_half", "prefill_tokens": 24},
        {"attention": "int8_half", "cache_dtype": "float32"},
    ],
    ids=str,
)
@torch.inference_mode()
def test_an_engine_in_integers_stays_near_the_exact_one(settings):
    model, prompts = tiny_model(mtp_heads=2), prompts_of(9, 40, 77)
    engine, texts = run_engine(model, prompts, **settings)
    assert (engine.arena.dtype == torch.int8) == (settings.get("cache_dtype", "int8") == "int8")
    for prompt, ours in zip(prompts, texts, strict=True):
        logits = model.logits(torch.tensor(prompt + list(ours.token_ids)))[len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(ours.token_ids)[:, None])[:, 0]
        assert 1e-6 < (torch.tensor(ours.logprobs) - logprobs).abs().mean() < 0.2


@torch.inference_mode()
def test_drafts_and_cached_prefixes_read_the_int8_cache():
    """Greedy texts are the same with drafts and without, and with a prefix that an earlier request left."""
    model, (prompt,) = tiny_model(mtp_heads=2), prompts_of(200)
    _, (plain,) = run_engine(model, [prompt], cache_dtype="int8", speculative=False)
    engine, (drafted,) = run_engine(model, [prompt], cache_dtype="int8")
    assert drafted.token_ids == plain.token_ids
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    sequence = engine.submit(Request("again", tuple(prompt), params))
    while engine.has_work:
        engine.step()
    assert sequence.completion().num_cached_tokens >= 100


def test_an_int8_cache_has_half_the_bytes_of_bfloat16_and_its_scales():
    layers = tiny_config().attention_layers()
    model = tiny_model()
    arenas = {
        name: Engine(model, config=EngineConfig(cache_dtype=name, cache_gigabytes=0.01)).arena
        for name in ("bfloat16", "int8")
    }
    for length in (1, 50, 400):
        expected = 0
        for spec in layers:
            kept = length if spec.window_keys is None else min(length, spec.window_keys - 1)
            expected += kept * spec.num_kv_heads * (spec.key_dim + spec.value_dim + 8)
        assert arenas["int8"].ideal_bytes(length) == expected
        numbers = sum(spec.key_dim + spec.value_dim for spec in layers[:1])
        assert expected / arenas["bfloat16"].ideal_bytes(length) == pytest.approx((numbers + 8) / (2 * numbers))
    assert math.isclose(
        arenas["int8"].page_bytes / arenas["bfloat16"].page_bytes, (numbers + 8) / (2 * numbers), rel_tol=0.1
    )


def test_a_cache_that_no_accelerator_kernel_reads_is_not_captured(monkeypatch):
    monkeypatch.setattr("openmimo.engine.worker.triton_unavailable", lambda on_cpu, dtype: None)
    model = tiny_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert why_no_graphs(model, torch.float8_e4m3fn) is None
    assert "int8 cache" in why_no_graphs(model, torch.int8)
