"""Steps with drafts that are planned before accepted counts are read give the tokens and drafts of other steps.

As in test_planning_ahead.py, a CPU runs the code of an accelerator: it computes a step at once, and the engine reads
its results one step late.
"""

import pytest
import torch
from conftest import tiny_model
from test_planning_ahead import ids, requests, serve_model
from test_speculative import counting_model

from openmimo.core.records import Request, SamplingParams
from openmimo.engine import engine as engine_module
from openmimo.engine.ahead import AheadWorker
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.runner import Runner
from openmimo.engine.step import ahead_shapes

KINDS = [
    {"temperature": 0.0},
    {"temperature": 0.6, "top_p": 0.9, "top_logprobs": 2},
    {"temperature": 0.7, "top_k": 20, "logprobs": True, "stop_token_ids": tuple(range(0, 160, 9))},
    {"temperature": 0.4, "min_p": 0.05, "max_repeats": 3},
    {"temperature": 0.0, "max_tokens": 1},
    {"temperature": 0.3, "max_tokens": 37},
]
LONG = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
NOISY, SURE, RANDOM = (
    counting_model(3, noise=0.8, num_layers=3).to(torch.float64),
    counting_model(3, noise=0.1).to(torch.float64),
    tiny_model(11, mtp_heads=3).to(torch.float64),
)


@pytest.fixture(autouse=True)
def ahead(monkeypatch):
    monkeypatch.setattr(engine_module, "works_ahead", lambda device: True)


def settings(**changes):
    return {"cache_gigabytes": 0.01, "adaptive_drafts": False, "num_drafts": 3, **changes}


@pytest.mark.parametrize(
    ("model", "num_drafts", "gigabytes"),
    [
        (NOISY, 3, 0.0007),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (NOISY, 3, 0.01),
                (NOISY, 1, 0.01),
                (NOISY, 1, 0.0007),
                (SURE, 3, 0.01),
                (SURE, 2, 0.0007),
                (RANDOM, 3, 0.01),
                (RANDOM, 3, 0.0007),
            ]
        ),
    ],
)
def test_tokens_and_drafts_are_those_of_a_host_that_waits(monkeypatch, model, num_drafts, gigabytes):
    work, options = requests(KINDS, 9), settings(num_drafts=num_drafts, cache_gigabytes=gigabytes)
    expected, waiting = serve_model(monkeypatch, model, False, work, **options)
    found, engine = serve_model(monkeypatch, model, True, work, **options)
    assert engine._plans_ahead and not waiting._plans_ahead
    assert (engine.scheduler.num_preemptions > 0) == (gigabytes < 0.001)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert ours.logprobs == theirs.logprobs or torch.allclose(*map(torch.tensor, (ours.logprobs, theirs.logprobs)))
    if not engine.scheduler.num_preemptions:  # the drafts of a text that is read again begin elsewhere
        assert engine.stats.offered == waiting.stats.offered
        assert engine.stats.accepted == waiting.stats.accepted


def test_each_sequence_has_its_own_number_of_drafts(monkeypatch):
    """A policy gives a limit for each sequence and step. No text has more drafts in a step, and no token changes."""
    work, generator, given = requests(KINDS, 6), torch.Generator().manual_seed(0), []
    plain, _ = serve_model(monkeypatch, NOISY, False, work, cache_gigabytes=0.01, speculative=False)

    def limits(runner, sequences):
        numbers = torch.randint(0, 4, (len(sequences),), generator=generator).tolist()
        given.append(numbers)
        return numbers

    monkeypatch.setattr(Runner, "_draft_limits", limits)
    found, engine = serve_model(monkeypatch, NOISY, True, work, **settings())
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    offered, most = engine.stats.offered, [sum(n > head for step in given for n in step) for head in range(3)]
    assert all(0 < count <= limit for count, limit in zip(offered, most, strict=True))
    assert sum(min(step) < max(step) for step in given) > 5 and sum(engine.stats.accepted) > 10


def test_a_step_can_be_computed_twice(monkeypatch):
    """A capture runs the work of a step three times before its first replay."""
    real, compared = AheadWorker._verify, []

    def twice(worker, step):
        once = real(worker, step)
        results, rows = once.results_BX.clone(), once.rows_BM.clone()
        again = real(worker, step)
        compared.append(torch.equal(results, again.results_BX) and torch.equal(rows, again.rows_BM))
        return again

    monkeypatch.setattr(AheadWorker, "_verify", twice)
    serve_model(monkeypatch, NOISY, True, requests(KINDS, 5), **settings())
    assert len(compared) > 10 and all(compared)


def test_the_host_reads_a_step_late_and_knows_the_lengths_then():
    engine = Engine(SURE, config=EngineConfig(**settings()))
    state = engine.submit(Request("1", ids(9, 0), SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)))
    lengths = []
    while engine.has_work:
        engine.step()
        lengths.append(len(state.tokens) - state.prompt_length)
        assert state.num_possible_tokens <= 3
    assert lengths[:3] == [0, 1, 5] and lengths[-1] == 12 and len(lengths) == 5
    assert state.completion().finish_reason == "length"


def test_penalties_hold_back_the_steps_and_drafts_continue_after_them():
    """The worker learns the lengths again after steps that the host planned."""
    engine = Engine(NOISY, config=EngineConfig(**settings()))
    first = engine.submit(Request("1", ids(9, 0), LONG))
    for _ in range(4):
        engine.step()
    assert first.num_pending_tokens == 1
    params = SamplingParams(max_tokens=6, temperature=0.0, logit_bias={3: 1.0}, ignore_eos=True)
    second = engine.submit(Request("2", ids(9, 1), params))
    while not second.finish_reason:
        engine.step()
        assert first.finish_reason or not first.num_pending_tokens
    while engine.has_work:
        engine.step()
    reference = Engine(NOISY, config=EngineConfig(**settings(num_drafts=None, speculative=False)))
    states = [reference.submit(Request(str(n), ids(9, n), each)) for n, each in enumerate((LONG, params))]
    while reference.has_work:
        reference.step()
    assert [first.tokens, second.tokens] == [state.tokens for state in states]


def test_sessions_go_on_where_a_stop_token_ended_the_text():
    """The step on its way has written keys and states behind the end. The drafts of the next turn do not change."""
    stops = SamplingParams(max_tokens=30, temperature=0.0, stop_token_ids=tuple(range(0, 160, 7)))
    offered, tokens = [], []
    for ahead in (True, False):
        engine = Engine(NOISY, config=EngineConfig(**settings(plans_ahead=ahead)))
        assert engine._plans_ahead == ahead
        text = list(ids(30, 3))
        for turn in range(4):
            state = engine.submit(Request(str(turn), tuple(text), stops, session="s"))
            while engine.has_work:
                engine.step()
            text = [*state.tokens, *ids(5, turn)]
        offered.append((engine.stats.offered, engine.stats.accepted))
        tokens.append(text)
    assert tokens[0] == tokens[1] and offered[0] == offered[1]


def test_weights_change_while_a_step_is_on_its_way():
    model, other = counting_model(3, noise=0.8).to(torch.float64), counting_model(3, noise=0.5).to(torch.float64)
    engine = Engine(model, config=EngineConfig(**settings()))
    states = [engine.submit(Request(str(n), ids(30, n), LONG)) for n in range(2)]
    for _ in range(4):
        engine.step()
    engine.abort("1")
    engine.update_weights(other.state_dict(), version=3, recompute=False)
    known = len(states[0].tokens)
    while engine.has_work:
        engine.step()
    assert states[1].finish_reason == "abort"
    versions = list(states[0].policy_versions)
    assert versions == [0] * (known - 30) + [3] * (70 - known) and 0 < known - 30 < 40


def test_padding_has_sampling_parameters_where_texts_have_all_others():
    """64 texts fill the first parameters. An accelerator also reads those of the seat of padding, which are zero."""
    engine = Engine(NOISY, config=EngineConfig(max_sequences=64, **settings(cache_gigabytes=0.02)))
    for number in range(64):
        params = SamplingParams(max_tokens=4, temperature=0.5, ignore_eos=True, seed=number)
        engine.submit(Request(str(number), ids(9, number), params))
    while engine.num_running < 64:
        engine.step()
    engine.step()
    worker = engine._runner._ahead_worker
    spare_seat = worker.reserve()
    assert spare_seat >= 64
    assert not worker._worker.sampling.numbers(torch.tensor([spare_seat])).any()
    assert worker._worker.sampling.numbers(torch.arange(64))[0].all()


def test_the_memory_that_graphs_read_does_not_move_when_a_step_is_held_back():
    """A step with a bias is verified by the host, and has more rows than an engine without drafts decides tokens."""
    engine = Engine(NOISY, config=EngineConfig(max_sequences=4, **settings()))
    address = engine._runner.worker._decided_X.data_ptr()
    for number in range(4):
        bias = {"logit_bias": {3: 1.0}} if number == 0 else {}
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, **bias)
        engine.submit(Request(str(number), ids(9, number), params))
    while engine.has_work:
        engine.step()
    assert engine._runner.worker._decided_X.data_ptr() == address


def test_an_abort_of_the_last_text_drops_the_step_on_its_way():
    engine = Engine(NOISY, config=EngineConfig(**settings()))
    engine.submit(Request("1", ids(9, 0), LONG))
    for _ in range(4):
        engine.step()
    assert engine._flight is not None
    engine.abort("1")
    assert engine._flight is None and not engine.has_work and engine.arena.num_used == 0


def test_plain_steps_are_captured_in_large_batches():
    shapes = {
        (sequences, drafts): ahead_shapes(
            [drafts] * sequences, drafts, 100, num_drafts=3, max_sequences=256, max_positions=4096
        ).is_captured
        for sequences in (64, 65, 256)
        for drafts in (0, 3)
    }
    assert shapes == {(64, 0): True, (65, 0): True, (256, 0): True, (64, 3): True, (65, 3): False, (256, 3): False}
