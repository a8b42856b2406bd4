"""Any number of drafts of each sequence gives the text of plain decoding, and the engine counts the numbers.

A policy draws the numbers at random, so each step has sequences with and without drafts. In float64, no two candidates
are close enough for rounding to choose between them.
"""

import random
import re
from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_config
from test_planning_ahead import serve_model
from test_speculative import counting_model

from openmimo.core.records import Request, SamplingParams, Structure
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.llm import LLM
from openmimo.engine.speculative import DraftPolicy
from openmimo.model.mimo import MiMo

MODEL = counting_model(3, noise=0.8, num_layers=3).to(torch.float64)
KINDS = [
    {"temperature": 0.0},
    {"temperature": 0.6, "top_p": 0.9, "top_logprobs": 2, "logprobs": True},
    {"temperature": 0.5, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 1.0, "top_k": 20, "stop_token_ids": tuple(range(0, 160, 9)), "min_tokens": 6},
    {"temperature": 0.3, "logit_bias": {3: 2.0}, "logprobs": True},
    {"temperature": 0.0, "max_tokens": 2},
]
STEM = torch.randint(0, 160, (70,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def ragged(monkeypatch):
    """Makes every policy choose at random. The numbers that were chosen."""
    chosen, draws = [], random.Random(0)

    def choose(policy, seats, owners, limits):
        chosen.append([draws.randint(0, max(limit, 0)) for limit in limits])
        return chosen[-1]

    monkeypatch.setattr(DraftPolicy, "choose", choose)
    return chosen


def requests(count):
    """Prompts that share beginnings of a stem, with the kinds in turns."""
    return [
        Request(
            str(n),
            (*STEM[: 7 + 31 * n % 64], n),
            SamplingParams(**{"max_tokens": 24, "seed": n, **KINDS[n % len(KINDS)]}),
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("ahead", [False, True], ids=["waiting", "ahead"])
@pytest.mark.parametrize("prefix_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_texts_are_those_of_plain_decoding(monkeypatch, ragged, ahead, prefix_cache):
    settings = {"cache_gigabytes": 0.01, "prefix_cache": prefix_cache}
    plain, _ = serve_model(monkeypatch, MODEL, ahead, requests(12), speculative=False, **settings)
    found, engine = serve_model(monkeypatch, MODEL, ahead, requests(12), **settings)
    for ours, expected in zip(found, plain, strict=True):
        assert (ours.token_ids, ours.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert ours.logprobs == (None if expected.logprobs is None else pytest.approx(expected.logprobs, abs=1e-9))
    assert sum(min(step) < max(step) for step in ragged) > 10
    assert sum(engine.stats.accepted) > 20 and (engine.stats.num_cached_tokens > 0) == prefix_cache


def test_a_structure_is_followed_with_ragged_drafts(ragged):
    tokenizer = Tokenizer.train(["some words to learn from, 12 and 34"], vocab_size=300)
    model = randomize(MiMo(replace(tiny_config(mtp_heads=3), vocab_size=tokenizer.vocab_size)), 7).to(torch.float64)
    structure = Structure("regex", "(yes|no), [0-9]{3}")
    params = [
        SamplingParams(max_tokens=30, temperature=1.0, seed=seed, structure=structure if seed % 2 else None)
        for seed in range(4)
    ]
    plain, drafted = (
        LLM(model, tokenizer, speculative=speculative).generate(["a question"] * 4, params)
        for speculative in (False, True)
    )
    assert [one.text for one in drafted] == [one.text for one in plain]
    assert all(re.fullmatch(structure.source, one.text) for one in drafted[1::2])
    assert any(min(step) < max(step) for step in ragged)


@pytest.mark.parametrize("ahead", [False, True], ids=["waiting", "ahead"])
def test_numbers_of_drafts_are_counted_for_each_request(monkeypatch, ragged, ahead):
    found, engine = serve_model(monkeypatch, MODEL, ahead, requests(9), cache_gigabytes=0.01)
    stats, report = engine.stats, engine.stats.report()
    for one in found:
        assert sum(one.accepted_by_head) == sum(one.drafted) <= sum(n * k for k, n in enumerate(one.steps_by_drafts))
    totals = [sum(counts) for counts in zip(*(one.steps_by_drafts for one in found), strict=True)]
    accepted = [sum(counts) for counts in zip(*(one.accepted_by_head for one in found), strict=True)]
    assert report["steps_by_drafts"] == totals and sum(totals) == stats.sequence_steps
    assert totals[1] > 0 and totals[3] > 0 and accepted == stats.accepted
    assert report["accepted_per_step_by_head"] == [count / stats.sequence_steps for count in accepted]
    engine.reset_stats()
    assert engine.stats.report()["steps_by_drafts"] == [0, 0, 0, 0]


def test_the_policy_of_an_engine_learns_from_its_steps():
    """The heads of this model are nearly always right, so the engine soon uses them."""
    engine = Engine(counting_model(3, noise=0.1), config=EngineConfig(cache_gigabytes=0.01))
    states = [
        engine.submit(Request(str(n), tuple(STEM[:9]), SamplingParams(max_tokens=60, temperature=0.0, seed=n)))
        for n in range(2)
    ]
    while engine.has_work:
        engine.step()
    policy = engine._runner._draft_policy
    chances = policy.chances([0, 1], [state.arrival for state in states])
    assert engine.stats.accepted[0] > 10 and (chances[:, 0] > 0.9).all()
    assert 0.0 < policy.times.predict(2, 3, 6) < 60.0
