"""What holds bit for bit on an accelerator, and what within which tolerance (docs/engine.md).

`pytest -m gpu` runs these tests. Where a tolerance is stated, a text may differ only at a position where its two
candidates are closer than that.
"""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomize, tiny_config, tiny_model

from openmimo.core.records import Request, SamplingParams, Structure
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.sampler import RowChange, SamplingInput, SamplingTable, decide, decided_logprobs, seat_sampling
from openmimo.kernels.operations import LINEAR, LinearNeed
from openmimo.kernels.weights import quantize
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
FORM = Structure("json_schema", json.dumps(SCHEMA))
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.15}  # of a log-probability, between batches or with drafts


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


def greedy(number, length, max_tokens=24, seed=0, **options):
    params = SamplingParams(
        max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=True, top_logprobs=2, **options
    )
    return Request(str(number), ids(length, 100 * seed + number), params)


def a_model(device, weights="plain", dtype=torch.bfloat16, **changes):
    model = tiny_model(3, **changes).to(device, dtype)
    if weights != "plain":
        quantize_model(model, weights)
    return model


def with_text(device, dtype=torch.float32, **changes):
    """A model whose vocabulary holds that of the tokenizer."""
    config = tiny_config(**changes)
    return randomize(MiMo(replace(config, vocab_size=384)), 3).to(device, dtype)


def assert_differ_only_at_ties(ours, theirs, tolerance):
    """Two greedy texts and their log-probabilities are equal up to a near tie. Returns the number of equal tokens."""
    for place, pair in enumerate(zip(ours.top_logprobs, theirs.top_logprobs, strict=True)):
        (best, first), (_, second) = pair[0]
        other = dict(pair[1])
        assert abs(first - other.get(best, -np.inf)) < tolerance or first - second < tolerance
        if ours.token_ids[place] != theirs.token_ids[place]:
            assert first - second < 2 * tolerance
            return place
    return len(ours.token_ids)


@pytest.mark.parametrize(
    "weights, cache_dtype, shortest",
    [("plain", "auto", 20), ("plain", "fp8", 20), ("int8", "auto", 1), ("fp8", "auto", 1)],
)
def test_a_text_does_not_depend_on_the_texts_next_to_it(device, weights, cache_dtype, shortest):
    """Bit for bit in bfloat16, where the batch has the same shape: prompts of the same lengths, read together.

    With narrow weights this holds for decoding. In long prompts, the tokens of an expert are one product of torch,
    which rounds by their number.
    """
    model = a_model(device, weights)
    length = 9 if shortest > 1 else 0
    found, others = [], []
    for seed in (1, 2):
        requests = [greedy(number, shortest + length * number, seed=seed) for number in range(1, 8)]
        (own, *rest), _ = serve(model, [greedy(0, shortest), *requests], cache_dtype=cache_dtype)
        found.append((own.token_ids, own.logprobs, own.top_logprobs))
        others.append([one.token_ids for one in rest])
    assert found[0] == found[1]
    assert others[0] != others[1]


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_products_with_narrow_weights_do_not_depend_on_the_rows(device, weight_format):
    """Bit for bit for 1 to 16 rows."""
    weight = torch.randn(384, 256, device=device).bfloat16()
    layers = ((quantize(weight, weight_format), None),)
    x = torch.randn(16, 256, device=device).bfloat16()
    rows = []
    for count in (1, 2, 3, 8, 16):
        name, backend = LINEAR.choose(LinearNeed(count, x.dtype, False, True, False, layers[0][0].format, 256))
        assert name == "triton"
        rows.append(backend.run(x[:count], layers)[0])
    assert all(torch.equal(row, rows[0]) for row in rows)
    assert rows[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_batch_changes_a_text_only_at_ties(device, dtype):
    model = a_model(device, dtype=dtype)
    requests = [greedy(number, 20 + 9 * number) for number in range(12)]
    together, _ = serve(model, requests)
    compared = 0
    for request, theirs in list(zip(requests, together, strict=True))[::3]:
        (ours,), _ = serve(model, [request])
        compared += assert_differ_only_at_ties(ours, theirs, TOLERANCES[dtype])
    assert compared > (90 if dtype == torch.float32 else 20)


@pytest.mark.parametrize(
    "weights, dtype", [("plain", torch.float32), ("plain", torch.bfloat16), ("int8", torch.bfloat16)], ids=str
)
def test_drafts_change_a_text_only_at_ties(device, weights, dtype):
    model = a_model(device, weights, dtype=dtype, mtp_heads=3)
    requests = [greedy(number, 20 + 9 * number) for number in range(6)]
    plain, _ = serve(model, requests, speculative=False)
    drafted, engine = serve(model, requests, speculative=True, adaptive_drafts=False)
    assert sum(engine.stats.offered) > 100
    compared = sum(assert_differ_only_at_ties(*pair, TOLERANCES[dtype]) for pair in zip(drafted, plain, strict=True))
    assert compared > (140 if dtype == torch.float32 else 30)


def together_requests():
    """Structures, penalties, log-probabilities, recorded experts and sessions, in one batch."""
    kinds = [
        {"structure": FORM, "frequency_penalty": 0.3, "logprobs": True},
        {"repetition_penalty": 1.3, "presence_penalty": 0.2, "top_logprobs": 2},
        {"logit_bias": {5: 3.0, 9: -4.0}, "top_p": 0.8, "routed_experts": True},
        {"structure": FORM, "min_tokens": 4, "temperature": 0.0, "logit_bias": {7: 1.0}},
        {"min_tokens": 12, "stop_token_ids": tuple(range(0, 160, 4)), "frequency_penalty": 0.5},
        {"prompt_logprobs": True, "top_k": 20},
    ]
    requests = []
    for number in range(12):
        options = {"max_tokens": 40, "seed": number, "temperature": 1.0, **kinds[number % 6]}
        session = f"s{number}" if number in (1, 2) else None
        requests.append(
            Request(str(number), ids(12 + 23 * number % 90, number), SamplingParams(**options), session=session)
        )
    return requests


@pytest.mark.parametrize(
    "settings",
    [
        {"speculative": True, "adaptive_drafts": False},
        {"speculative": False, "cache_gigabytes": 0.0009, "prefix_cache": False},
    ],
    ids=["drafts", "preemption"],
)
def test_all_features_together_are_those_of_the_cpu(device, settings):
    model = with_text("cpu", mtp_heads=3)
    expected, _ = serve(model, together_requests(), TOKENIZER, speculative=False)
    found, engine = serve(copy.deepcopy(model).to(device), together_requests(), TOKENIZER, **settings)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.finish_reason, ours.error) == (
            theirs.token_ids,
            theirs.finish_reason,
            theirs.error,
        )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(theirs, name):
                assert np.allclose(getattr(ours, name), getattr(theirs, name), atol=TOLERANCES[torch.float32])
        if theirs.routed_experts is not None:
            assert (np.sort(ours.routed_experts) == np.sort(theirs.routed_experts)).all()
    assert {one.finish_reason for one in found} == {"stop", "length"}
    assert not settings["speculative"] or sum(engine.stats.offered) > 50
    assert "prefix_cache" not in settings or engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("weights", ["plain", "int8"])
def test_an_int8_cache_is_that_of_the_cpu(device, weights):
    on_cpu = tiny_model(3)
    if weights != "plain":
        quantize_model(on_cpu, weights)
    requests = [greedy(number, 20 + 9 * number) for number in range(5)]
    expected, _ = serve(on_cpu, requests, cache_dtype="int8")
    found, _ = serve(copy.deepcopy(on_cpu).to(device), requests, cache_dtype="int8")
    plain, _ = serve(on_cpu, requests)
    compared = [assert_differ_only_at_ties(*pair, 3e-2) for pair in zip(found, expected, strict=True)]
    assert sum(compared) > 60
    assert [one.logprobs for one in expected] != [one.logprobs for one in plain]


@pytest.mark.parametrize("weights", ["plain", "int8"])
def test_new_weights_with_drafts_are_read_by_graphs(device, weights):
    """Block-scaled weights are quantized again; the captured passes of the heads read the new ones as well."""
    old, new = (tiny_model(seed, mtp_heads=2).to(device) for seed in (5, 6))
    values = new.state_dict()
    for model in (old, new):
        if weights != "plain":
            quantize_model(model, weights)
    engine = Engine(old, config=EngineConfig(cache_gigabytes=0.05, speculative=True, adaptive_drafts=False))
    before = run(engine, [greedy(number, 30) for number in range(3)])
    engine.update_weights(values, version=1)
    after = run(engine, [greedy(number, 30) for number in range(3)])
    expected, fresh = serve(new, [greedy(number, 30) for number in range(3)], speculative=True, adaptive_drafts=False)
    assert [one.token_ids for one in after] == [one.token_ids for one in expected]
    assert [one.drafted for one in after] == [one.drafted for one in expected]
    assert [one.token_ids for one in after] != [one.token_ids for one in before]
    graphs = engine._runner.worker.graphs
    assert (graphs is not None) == (fresh._runner.worker.graphs is not None) == (weights == "plain")
    assert graphs is None or len(graphs._ahead_replays) > 0  # block-scaled weights are captured with tokens of 16 bits


@pytest.mark.parametrize("options", [{"logprobs": True}, {"top_logprobs": 5}, {"structure": FORM}], ids=str)
def test_log_probabilities_and_structures_need_no_further_pass(device, options):
    model = with_text(device)
    passes = []
    for kind in ({}, options):
        params = SamplingParams(max_tokens=9, temperature=1.0, seed=1, min_tokens=9, **kind)
        _, engine = serve(
            model, [Request(str(n), ids(20, n, 330), params) for n in range(3)], TOKENIZER, plans_ahead=False
        )
        passes.append(engine.stats.num_graph_passes + engine.stats.num_other_passes)
    assert passes[0] == passes[1] > 8


def test_sampling_does_not_wait_for_the_device(device):
    """Masks, biases, penalties, stops, draws and log-probabilities of many rows are queued without a read."""
    vocab, num_rows = 1000, 24
    params = SamplingParams(
        temperature=0.8, top_p=0.9, logit_bias={3: 2.0}, frequency_penalty=0.5, repetition_penalty=1.2, min_tokens=3
    )
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    masks = torch.rand(num_rows, vocab, generator=generator) < 0.5
    bits = np.packbits(masks, axis=1, bitorder="little")
    logits = 2 * torch.randn(num_rows, vocab, generator=generator)
    found = []
    for where in (device, torch.device("cpu")):
        table, seats = SamplingTable(vocab, where), torch.arange(num_rows, device=where)
        there = SamplingInput(
            tuple(
                seat_sampling(seat, params, prompt=(1, 2), stop_ids=(0, 4), device=where) for seat in range(num_rows)
            ),
            tuple((seat, [5, 6, 5]) for seat in range(num_rows)),
            seats_S=seats,
            uniform_S=uniform.to(where),
            has_filters=True,
            changes=tuple(RowChange(row, row, row % 2, row % 3 == 0, bits[row]) for row in range(num_rows)),
            logprob_seats_R=seats,
            num_top_logprobs=3,
        )
        rows, tokens = logits.to(where), torch.arange(num_rows, device=where)
        for attempt in range(2):  # the first one compiles kernels and allocates pinned memory
            if where.type != "cpu":
                torch.cuda.set_sync_debug_mode("error" if attempt else "default")
            try:
                table.update(there)
                decided = decide(rows, there, table, tokens)
                logprobs, top_ids, _ = decided_logprobs(rows, decided, there, table)
            finally:
                if where.type != "cpu":
                    torch.cuda.set_sync_debug_mode("default")
        found.append((decided.tolist(), top_ids.tolist(), logprobs.cpu()))
    assert found[0][:2] == found[1][:2]
    assert torch.allclose(found[0][2], found[1][2], atol=1e-4)
    assert all(masks[row, token] for row, token in enumerate(found[0][0]))
