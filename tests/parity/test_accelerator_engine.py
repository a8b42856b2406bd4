"""The engine on an accelerator: every feature gives there what it gives on a CPU.

`pytest -m gpu` runs these tests. Models are float32, so that rounding decides no token.
"""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import randomize, tiny_config, tiny_model
from test_speculative import counting_model

from openmimo.core.errors import UserError
from openmimo.core.records import Request, SamplingParams, Structure
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.kernels.operations import SAMPLING, SamplingNeed
from openmimo.model.context import PackedContext, RoutingTape
from openmimo.model.mimo import MiMo
from openmimo.model.weight_formats import quantize_model
from openmimo.runtime.device import resolve_device

pytestmark = pytest.mark.gpu
TOKENIZER = Tokenizer.train(["some words to learn from, 12 and 34", '{"answer": "yes"}'], vocab_size=330)
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def device():
    found = resolve_device("auto")
    if found.type == "cpu":
        pytest.skip("no accelerator")
    return found


def ids(count, seed=0, vocab=160):
    return tuple(torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def serve(model, requests, tokenizer=None, **settings):
    engine = Engine(model, tokenizer, EngineConfig(**{"cache_gigabytes": 0.05, **settings}))
    return run(engine, requests), engine


def run(engine, requests):
    states = [engine.submit(request) for request in requests]
    while engine.has_work:
        engine.step()
    return [state.completion() for state in states]


def on(device, **changes):
    """A model on the CPU, and the same on the device."""
    model = tiny_model(3, **changes)
    return model, copy.deepcopy(model).to(device)


KINDS = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.8, "top_logprobs": 3},
    {"temperature": 1.0, "top_k": 30, "min_p": 0.01, "logit_bias": {5: 2.0}, "logprobs": True},
    {"temperature": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    {"temperature": 0.0, "min_tokens": 8, "stop_token_ids": tuple(range(0, 160, 4))},
]


def mixed(count=9, **common):
    return [
        Request(
            str(n), ids(7 + 31 * n % 120, n), SamplingParams(**{"max_tokens": 25, "seed": n, **KINDS[n % 5], **common})
        )
        for n in range(count)
    ]


@pytest.mark.parametrize(
    "settings", [{}, {"prefill_tokens": 40, "mixed_prefill_tokens": 24}, {"graphs": False}], ids=str
)
def test_all_options_are_those_of_the_cpu(device, settings):
    on_cpu, there = on(device)
    expected, _ = serve(on_cpu, mixed())
    found, engine = serve(there, mixed(), **settings)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        if theirs.logprobs:
            assert np.allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
    assert engine._plans_ahead
    report = engine.stats.report()
    assert (report["num_graphs"] > 1 and report["graph_bytes"] > 0) == settings.get("graphs", True)
    assert (report["num_graph_passes"] > 10) == settings.get("graphs", True)
    assert (engine._runner.worker.graphs is not None) == settings.get("graphs", True)


def test_drafts_change_no_token(device):
    model = tiny_model(3, mtp_heads=3).to(device)
    plain, _ = serve(model, mixed(), speculative=False)
    drafted, engine = serve(model, mixed(), speculative=True, adaptive_drafts=False)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    assert sum(engine.stats.offered) > 20


def drafting(count):
    """Requests whose steps with drafts are planned ahead: no option changes their logits."""
    kinds = [KINDS[0], KINDS[1], {"temperature": 0.7, "top_k": 20, "logprobs": True}, {"temperature": 0.4}]
    return [
        Request(str(n), ids(7 + 31 * n % 120, n), SamplingParams(**{"max_tokens": 25 + n, "seed": n, **kinds[n % 4]}))
        for n in range(count)
    ]


@pytest.mark.parametrize(("noise", "num_drafts"), [(0.1, 2), (0.8, 3)], ids=["sure", "noisy"])
def test_drafts_that_are_planned_ahead(device, noise, num_drafts):
    """The same tokens as without drafts, and the same drafts as of a host that waits, in a full cache as well."""
    model = counting_model(3, noise=noise).to(device)
    settings = {"num_drafts": num_drafts, "adaptive_drafts": False}
    plain, _ = serve(model, drafting(11), speculative=False)
    waited, waiting = serve(model, drafting(11), plans_ahead=False, **settings)
    found, engine = serve(model, drafting(11), **settings)
    full, preempting = serve(model, drafting(11), cache_gigabytes=0.0004, prefix_cache=False, **settings)
    assert engine._plans_ahead and not waiting._plans_ahead
    assert engine._runner.worker.graphs._ahead_replays and preempting.scheduler.num_preemptions > 0
    assert engine.stats.accepted == waiting.stats.accepted and engine.stats.offered == waiting.stats.offered
    assert sum(engine.stats.accepted) > 20 and preempting.arena.num_used == 0
    for expected, *others in zip(plain, waited, found, full, strict=True):
        assert all(other.token_ids == expected.token_ids for other in others)
        assert not expected.logprobs or np.allclose(others[1].logprobs, expected.logprobs, atol=1e-4)


def test_weights_change_under_a_step_with_drafts_on_its_way(device):
    model, other = counting_model(3, noise=0.8).to(device), counting_model(3, noise=0.5).to(device)
    engine = Engine(model, config=EngineConfig(cache_gigabytes=0.05, adaptive_drafts=False))
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    state = engine.submit(Request("1", ids(30, 0), params))
    for _ in range(8):
        engine.step()
    engine.update_weights(other.state_dict(), version=1)
    known = len(state.tokens)
    while engine.has_work:
        engine.step()
    rest = SamplingParams(max_tokens=90 - known, temperature=0.0, ignore_eos=True)
    (expected,), _ = serve(other, [Request("2", tuple(state.tokens[:known]), rest)], speculative=False)
    assert 30 < known < 90 and state.tokens[known:] == expected.token_ids


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_captured_drafts_are_those_of_single_launches(device, num_drafts):
    """Also where texts begin, end and share prefixes, so that passes are padded. Output alone would not show it."""
    model = tiny_model(3, mtp_heads=3).to(device)
    drafts = {}
    for graphs in (True, False):
        config = EngineConfig(
            num_drafts=num_drafts, adaptive_drafts=False, graphs=graphs, cache_gigabytes=0.05, plans_ahead=False
        )
        engine = Engine(model, config=config)
        worker, found = engine._runner.worker, []
        real = worker._draft

        def draft(heads, width, real=real, found=found):
            drafts_HW = real(heads, width)
            found.append(drafts_HW.tolist())
            return drafts_HW

        worker._draft = draft
        for number, request in enumerate(mixed(11)):
            engine.submit(request)
            if number % 2:
                engine.step()
        while engine.has_work:
            engine.step()
        drafts[graphs] = found
        assert not graphs or len(worker.graphs._draft_replays) > 1
    assert len(drafts[True]) == len(drafts[False]) > 20
    for ours, theirs in zip(drafts[True], drafts[False], strict=True):
        assert [row[: len(theirs[0])] for row in ours] == theirs


def test_a_text_does_not_depend_on_its_batch(device):
    """Bitwise where our kernels compute; the products of torch's library round by the number of rows."""
    model = tiny_model(3).to(device)
    together, _ = serve(model, mixed(16))
    for number in (0, 1, 7):
        (alone,), _ = serve(model, [mixed(16)[number]])
        assert alone.token_ids == together[number].token_ids
        if alone.logprobs:
            assert np.allclose(alone.logprobs, together[number].logprobs, atol=1e-4)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_structures(device, temperature, speculative):
    """Together with texts without a structure, which then wait for the host as well."""
    config = tiny_config(mtp_heads=2)
    model = randomize(MiMo(type(config)(**{**vars(config), "vocab_size": 384})), 3).to(device)
    form = Structure("json_schema", json.dumps(SCHEMA))
    requests = [
        Request(str(n), ids(9 + n, n, 330), SamplingParams(max_tokens=80, temperature=temperature, seed=n, **kind))
        for n, kind in enumerate([{"structure": form}, {}, {"structure": form}, {}])
    ]
    found, _ = serve(model, requests, TOKENIZER, speculative=speculative)
    for completion in found[::2]:
        if completion.finish_reason == "stop":
            assert set(json.loads(completion.text)) == {"kind", "size"}
        assert completion.finish_reason in ("stop", "length"), completion.error
    assert temperature == 0.0 or any(completion.finish_reason == "stop" for completion in found[::2])


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_quantized_weights(device, weights):
    on_cpu = tiny_model(3)
    quantize_model(on_cpu, weights)
    expected, _ = serve(on_cpu, mixed(5))
    found, _ = serve(copy.deepcopy(on_cpu).to(device), mixed(5))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_quantized_weights_in_captured_graphs(device, weights):
    """Activations have 16 bits. Padding changes how torch's library rounds, so a near tie may fall elsewhere."""
    model = tiny_model(3).to(device, torch.bfloat16)
    quantize_model(model, weights)
    params = SamplingParams(max_tokens=24, temperature=0.0, logprobs=True, ignore_eos=True)
    requests = [Request(str(n), ids(7 + 31 * n % 120, n), params) for n in range(9)]
    plain, _ = serve(model, requests, graphs=False)
    found, engine = serve(model, requests)
    graphs = engine._runner.worker.graphs
    assert graphs is not None and graphs.max_prompt_tokens >= 2048
    assert engine.stats.num_graph_passes > 10 * engine.stats.num_other_passes
    num_equal = 0
    for ours, theirs in zip(found, plain, strict=True):
        same = next((n for n in range(24) if ours.token_ids[n] != theirs.token_ids[n]), 24)
        num_equal += same
        assert np.allclose(ours.logprobs[:same], theirs.logprobs[:same], atol=0.1)
    assert num_equal > 0.7 * 24 * len(requests)


def test_an_fp8_cache(device):
    """Log-probabilities move by the rounding of keys and values, which chunks read from the cache."""
    model = tiny_model(3).to(device, torch.bfloat16)
    params = SamplingParams(max_tokens=1, temperature=0.0, top_logprobs=5, logprobs=True)
    requests = [Request(str(n), ids(90, n), params) for n in range(4)]
    values = {}
    for cache_dtype in ("auto", "fp8"):
        found, _ = serve(model, requests, cache_dtype=cache_dtype, prefill_tokens=16)
        values[cache_dtype] = [one.logprobs[0] for one in found]
    assert values["auto"] != values["fp8"]
    assert np.allclose(values["auto"], values["fp8"], atol=0.3)


def test_preemption(device):
    model = tiny_model(3).to(device)
    expected, _ = serve(model, mixed(9, max_tokens=60))
    found, engine = serve(model, mixed(9, max_tokens=60), cache_gigabytes=0.0006, prefix_cache=False)
    assert engine.scheduler.num_preemptions > 0
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert engine.arena.num_used == 0


def test_sessions_and_prefixes(device):
    _, model = on(device)
    engine = Engine(model, config=EngineConfig(cache_gigabytes=0.05))
    params = SamplingParams(max_tokens=12, temperature=0.0)
    (first,) = run(engine, [Request("1", ids(70, 1), params, session="s")])
    turn = tuple(first.prompt_token_ids + first.token_ids) + ids(9, 2)
    (second,) = run(engine, [Request("2", turn, params, session="s")])
    (third,) = run(engine, [Request("3", turn, params)])
    (again,) = run(engine, [Request("4", turn, params)])
    assert second.num_cached_tokens == len(turn) - 10 and third.num_cached_tokens == 0 < again.num_cached_tokens
    assert second.token_ids == third.token_ids == again.token_ids


def test_routed_experts(device):
    on_cpu, model = on(device)
    params = SamplingParams(max_tokens=12, temperature=0.0, routed_experts=True)
    for completion in serve(model, [Request(str(n), ids(50, n), params) for n in range(3)])[0]:
        tokens = torch.tensor(completion.prompt_token_ids + completion.token_ids)[:-1]
        context = PackedContext((len(tokens),))
        context.routing = RoutingTape(record=True)
        with torch.no_grad():
            on_cpu(tokens, context)
        recorded = context.routing.recorded
        expected = torch.stack([recorded[layer] for layer in sorted(recorded)], dim=1).numpy()
        assert (np.sort(completion.routed_experts) == np.sort(expected)).all()


def test_weights_change_under_captured_graphs(device):
    """The graphs stay and read the new weights, also while a step is on its way."""
    model, other = tiny_model(5).to(device), tiny_model(6).to(device)
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    engine = Engine(model, config=EngineConfig(cache_gigabytes=0.05))
    run(engine, [Request("warm", ids(30, 0), params)])
    num_captured = engine._runner.worker.graphs.num_captured
    assert num_captured >= 2  # prompts and decoding
    state = engine.submit(Request("1", ids(30, 0), params))
    for _ in range(8):
        engine.step()
    engine.update_weights(other.state_dict(), version=1)
    known = len(state.tokens)
    while engine.has_work:
        engine.step()
    rest = SamplingParams(max_tokens=60 - known, temperature=0.0, ignore_eos=True)
    (expected,), _ = serve(other, [Request("2", tuple(state.tokens[:known]), rest)])
    assert state.tokens[known:] == expected.token_ids
    assert engine._runner.worker.graphs.num_captured == num_captured


def test_a_bad_request_ends_alone(device):
    """Values that are not finite, a structure that cannot go on, and a request that can never run."""
    config = tiny_config()
    model = randomize(MiMo(type(config)(**{**vars(config), "vocab_size": 384})), 3).to(device)
    engine = Engine(model, TOKENIZER, EngineConfig(cache_gigabytes=0.05))
    good = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    with pytest.raises(UserError):
        engine.submit(Request("x", ids(9), SamplingParams(structure=Structure("json_schema", '{"type": 5}'))))
    with pytest.raises(UserError):
        engine.submit(Request("x", (999,), good))
    (expected,) = run(engine, [Request("0", ids(20, 1), good)])
    with torch.no_grad():
        row = model.model.embed_tokens.weight[7].clone()
        model.model.embed_tokens.weight[7] = float("nan")
        engine.update_weights(None, version=1)
        prompt = tuple(token if token != 7 else 8 for token in ids(20, 1))
        bad, fine = run(engine, [Request("1", (7, 7, 7), good), Request("2", prompt, good)])
        model.model.embed_tokens.weight[7] = row
    engine.update_weights(None, version=2)
    assert bad.finish_reason == "error" and "finite" in bad.error
    assert fine.finish_reason in ("length", "error")
    (again,) = run(engine, [Request("3", ids(20, 1), good)])
    assert again.token_ids == expected.token_ids


@pytest.mark.parametrize("vocab", [1000, 152_000])
@pytest.mark.parametrize("has_filters", [False, True])
def test_draws(device, has_filters, vocab):
    logits = 3 * torch.randn(40, vocab, device=device)
    logits[::2] = logits[::2].bfloat16().float()  # with ties
    rows = [(1.0, 0.9, 50.0, 0.0, 1.0), (0.7, 0.3, float("inf"), 0.0, 0.7), (1.2, 2.0, 20.0, 0.05, 1.2)]
    if not has_filters:
        rows = [(temperature, 2.0, float("inf"), 0.0, 1.0) for temperature, *_ in rows]
    numbers = torch.tensor((rows * 14)[:40], dtype=torch.float64, device=device).T
    uniform = torch.rand(40, dtype=torch.float64, device=device)
    backends = dict(SAMPLING.backends())
    assert SAMPLING.choose(SamplingNeed(vocab, torch.float32, False, True))[0] == "triton"
    ours, theirs = (backends[name].run.draw(logits, numbers, uniform, has_filters) for name in ("triton", "reference"))
    assert (ours == theirs).sum() >= 39  # a number at the border of two tokens may round to either
    chosen = [backends[name].run.logprobs(logits, ours, numbers[0], 3) for name in ("triton", "reference")]
    assert torch.allclose(chosen[0][0], chosen[1][0], atol=1e-4) and torch.equal(chosen[0][1], chosen[1][1])
