"""Planning a step before the results of the one before are read changes no token.

A CPU does not work ahead, so these tests let the engine believe that it does: the same code then queues a step, which a
CPU computes at once, and reads the step before.
"""

import pytest
import torch
from conftest import tiny_model

from openmimo.core.records import Request, SamplingParams
from openmimo.engine import engine as engine_module
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.scheduler import Scheduler

MODEL = tiny_model(11).to(torch.float64)
KINDS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.9, "top_logprobs": 2},
    {"temperature": 0.7, "top_k": 20, "logprobs": True, "stop_token_ids": tuple(range(0, 160, 9))},
    {"temperature": 1.0, "logit_bias": {3: 2.0}, "min_tokens": 9, "stop_token_ids": tuple(range(0, 160, 5))},
    {"temperature": 0.9, "min_p": 0.05, "max_repeats": 3},
    {"temperature": 0.0, "max_tokens": 1},
]


def ids(count, seed):
    return tuple(torch.randint(0, 160, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def requests(kinds, count):
    return [
        Request(
            str(n),
            ids(5 + 23 * n % 90, n % 4),
            SamplingParams(**{"max_tokens": 20, "seed": n, **kinds[n % len(kinds)]}),
        )
        for n in range(count)
    ]


def serve(monkeypatch, ahead, work, **settings):
    return serve_model(monkeypatch, MODEL, ahead, work, **settings)


def serve_model(monkeypatch, model, ahead, work, **settings):
    """Submits two requests a step. Returns the completions, and the engine."""
    monkeypatch.setattr(engine_module, "works_ahead", lambda device: ahead)
    engine = Engine(model, config=EngineConfig(**{"prefill_tokens": 40, "mixed_prefill_tokens": 24, **settings}))
    waiting, states, deltas = list(work), [], {}
    while waiting or engine.has_work:
        states += [engine.submit(request) for request in waiting[:2]]
        del waiting[:2]
        for state in engine.step():
            deltas.setdefault(state.request.id, []).extend(state.take_delta().token_ids)
    completions = [state.completion() for state in states]
    assert [deltas[str(n)] for n in range(len(states))] == [completion.token_ids for completion in completions]
    engine.forget_cached()
    assert engine.arena.num_used == 0
    return completions, engine


@pytest.mark.parametrize("gigabytes", [0.01, pytest.param(0.0008, marks=pytest.mark.slow)], ids=["roomy", "preempting"])
def test_results_do_not_depend_on_it(monkeypatch, gigabytes):
    work = requests(KINDS, 10)
    expected, _ = serve(monkeypatch, False, work, cache_gigabytes=gigabytes)
    found, engine = serve(monkeypatch, True, work, cache_gigabytes=gigabytes)
    reasons = {completion.finish_reason for completion in found}
    assert reasons >= {"stop", "length"}
    assert (engine.scheduler.num_preemptions > 0) == (gigabytes < 0.001)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert ours.logprobs == theirs.logprobs or torch.allclose(*map(torch.tensor, (ours.logprobs, theirs.logprobs)))


def test_a_step_returns_the_tokens_of_the_step_before(monkeypatch):
    monkeypatch.setattr(engine_module, "works_ahead", lambda device: True)
    engine = Engine(MODEL, config=EngineConfig(cache_gigabytes=0.01))
    state = engine.submit(Request("1", ids(9, 0), SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)))
    lengths = []
    while engine.has_work:
        engine.step()
        lengths.append(len(state.tokens) - state.prompt_length)
    assert lengths == [0, 1, 2, 3]
    assert engine.stats.num_steps == 2


@pytest.mark.parametrize("kind", [{"frequency_penalty": 0.5}, {"routed_experts": True}, {"prompt_logprobs": True}])
def test_a_request_that_needs_the_host_holds_back_all(monkeypatch, kind):
    """And only as long as it runs."""
    monkeypatch.setattr(engine_module, "works_ahead", lambda device: True)
    engine = Engine(MODEL, config=EngineConfig(cache_gigabytes=0.01))
    long, short = (SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True) for count in (12, 4))
    first = engine.submit(Request("1", ids(9, 0), long))
    engine.step()
    assert len(first.tokens) == 9
    second = engine.submit(Request("2", ids(9, 1), SamplingParams(**{**vars(short), **kind})))
    engine.step()
    assert len(first.tokens) == 11 and len(second.tokens) == 10
    while not second.finish_reason:
        engine.step()
    known = len(first.tokens)
    engine.step()
    assert len(first.tokens) == known and engine.has_work
    while engine.has_work:
        engine.step()
    assert len(first.tokens) == 21


def test_aborted_paused_and_updated_between_two_steps(monkeypatch):
    monkeypatch.setattr(engine_module, "works_ahead", lambda device: True)
    model, other = tiny_model(5), tiny_model(6)
    engine = Engine(model, config=EngineConfig(cache_gigabytes=0.01))
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    first, second = (engine.submit(Request(str(n), ids(30, n), params)) for n in range(2))
    for _ in range(4):
        engine.step()
    engine.abort("1")
    assert second.finish_reason == "abort" and len(second.tokens) == 33
    engine.pause()
    assert len(first.tokens) == 34 and engine.step() == []
    engine.resume()
    assert [state.request.id for state in (engine.step())] == ["0"]
    engine.update_weights(other.state_dict(), version=3)
    known = len(first.tokens)
    while engine.has_work:
        engine.step()
    assert list(first.policy_versions) == [0] * (known - 30) + [3] * (50 - known)
    assert len(second.tokens) == 33
    reference = Engine(model, config=EngineConfig(cache_gigabytes=0.01))
    alone = reference.submit(
        Request(
            "r", tuple(first.tokens[:known]), SamplingParams(max_tokens=50 - known, temperature=0.0, ignore_eos=True)
        )
    )
    while reference.has_work:
        reference.step()
    assert alone.tokens == first.tokens


@pytest.mark.parametrize("ends", [True, False])
def test_an_aborted_request_is_not_returned_again(monkeypatch, ends):
    """Also if its last results were read between two steps."""
    monkeypatch.setattr(engine_module, "works_ahead", lambda device: True)
    engine = Engine(MODEL, config=EngineConfig(cache_gigabytes=0.01))
    params = SamplingParams(max_tokens=3 if ends else 20, temperature=0.0, ignore_eos=True)
    state = engine.submit(Request("1", ids(9, 0), params))
    for _ in range(3):
        engine.step()
    engine.pause()
    engine.resume()
    assert engine.has_work and len(state.tokens) == 12
    assert engine.abort("1") is state
    assert state.finish_reason == ("length" if ends else "abort")
    assert engine.step() == [] and not engine.has_work and engine.abort("1") is None


@pytest.mark.parametrize("on_cpu", [True, False])
def test_every_position_of_a_prompt_has_a_page_on_an_accelerator(on_cpu):
    """So that a pass over it can be captured, also without a prefix cache. Pages before the window go afterwards."""
    config = EngineConfig(cache_gigabytes=0.01, prefix_cache=False)
    engine = Engine(MODEL, config=config)
    scheduler = Scheduler(engine.arena, None, config, num_drafts=0, on_cpu=on_cpu, free_idle=lambda: False)
    state = engine.submit(Request("1", ids(120, 0), SamplingParams(max_tokens=3)))
    scheduler.add(state)
    (planned, stop), *_ = scheduler.plan().prefills
    assert planned is state and stop == 120
    assert (state.held_pages.whole_from > 0) == on_cpu
    state.held_pages.leave_behind(120)
    assert state.held_pages.whole_from > 0
