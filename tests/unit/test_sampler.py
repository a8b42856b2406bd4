"""Sampling: the random numbers, the filters, and the resulting distribution."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sampled_rows import Draw, sample, sampling_of
from torch.utils._python_dispatch import TorchDispatchMode

from openmimo.core.records import SamplingParams
from openmimo.engine.sampler import (
    RowChange,
    SamplingInput,
    SamplingTable,
    decide,
    decided_logprobs,
    seat_sampling,
    seed_key,
    uniform,
)
from openmimo.kernels.drafting.reference import random_numbers
from openmimo.kernels.sampling.reference import filtered_probabilities

VOCAB = 11


def _logits(rows=1, seed=0):
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def test_random_numbers_are_uniform_and_independent():
    numbers = torch.tensor([[uniform(seed, position) for position in range(200)] for seed in range(200)])
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    counts = torch.histc(numbers, bins=20, min=0.0, max=1.0)
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_square < 45  # 19 degrees of freedom: above 45 once in 1500
    centered = numbers - 0.5
    assert (centered[1:] * centered[:-1]).mean().abs() < 0.002
    assert (centered[:, 1:] * centered[:, :-1]).mean().abs() < 0.002
    assert len({uniform(seed, position) for seed in range(50) for position in range(50)}) == 2500


def test_random_numbers_of_a_device_are_those_of_the_host():
    """Bit by bit, for seeds and positions of every size."""
    seeds = [0, 1, 7, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -5, 123456789012345678]
    positions = [0, 1, 2, 1000, (1 << 40) + 3]
    keys = torch.tensor([seed_key(seed) for seed in seeds for _ in positions])
    found = random_numbers(keys, torch.tensor(positions * len(seeds)))
    assert found.tolist() == [uniform(seed, position) for seed in seeds for position in positions]


def test_random_numbers_stay_what_they_are():
    """A seed must give the same text in every version."""
    assert uniform(0, 0) == 0.6524484863740321
    assert uniform(2**64 - 1, 12345) == 0.6785045720544753
    assert uniform(-1, 7) == uniform(2**64 - 1, 7)


def test_greedy_is_the_arg_max():
    logits = _logits(5)
    params = SamplingParams(temperature=0.0)
    assert sample(logits, [Draw(params, 0, row) for row in range(5)]) == logits.argmax(dim=-1).tolist()


def _by_definition(logits, params):
    """The filters, token by token with Python floats."""
    probabilities = (logits.double() / params.temperature).softmax(dim=-1).tolist()
    kept, mass = set(), 0.0
    for token in sorted(range(VOCAB), key=lambda token: -probabilities[token]):
        if mass >= params.top_p or (params.top_k and len(kept) == params.top_k):
            break
        kept.add(token)
        mass += probabilities[token]
    return torch.tensor([p if token in kept else 0.0 for token, p in enumerate(probabilities)]) / mass


PARAMS = [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=1.0, top_k=3),
    SamplingParams(temperature=2.0, top_p=0.6, top_k=4),
    SamplingParams(temperature=1.0, top_p=1e-6),
]


@pytest.mark.parametrize("params", PARAMS)
def test_filters_by_definition(params):
    logits = _logits(seed=3)
    sampling, table = sampling_of([Draw(params, 0, 0)])
    numbers = table.numbers(sampling.seats_S)
    found = filtered_probabilities(logits, numbers, has_filters=sampling.has_filters)[0]
    assert torch.allclose((found / found.sum()).float(), _by_definition(logits[0], params), atol=1e-6)


@pytest.mark.parametrize("params", PARAMS)
def test_frequencies_follow_the_distribution(params):
    count = 20_000
    logits = _logits(seed=4)
    tokens = sample(logits.expand(count, -1), [Draw(params, seed, 17) for seed in range(count)])
    observed = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    expected = _by_definition(logits[0], params).double() * count
    assert observed[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 30  # at most 10 degrees of freedom: above the limit once in 1000


def test_a_row_does_not_depend_on_the_others():
    logits = _logits(5, seed=5)
    draws = [Draw(params, 7 + row, 3 * row) for row, params in enumerate(PARAMS)]
    draws[2] = Draw(SamplingParams(temperature=0.0), 0, 0)
    together = sample(logits, draws)
    assert together == [sample(logits[row : row + 1], [draws[row]])[0] for row in range(5)]


def test_logprobs_are_at_the_sampling_temperature_before_the_filters():
    logits = _logits(3, seed=6)
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.5, top_k=1), SamplingParams(top_p=0.1)]
    params = [replace(p, logprobs=True) for p in params]
    found, *_ = decided_logprobs(logits, torch.tensor([1, 2, 3]), *sampling_of([Draw(p, 0, 0) for p in params]))
    expected = [(logits[row] / t).log_softmax(-1)[row + 1].item() for row, t in enumerate([1.0, 0.5, 1.0])]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def _penalized(logits, params, prompt, text):
    """The penalties token by token in Python floats."""
    expected = logits.tolist()
    for token in range(VOCAB):
        if token in (*prompt, *text):
            penalty = params.repetition_penalty
            expected[token] = expected[token] / penalty if expected[token] > 0 else expected[token] * penalty
        if token in text:
            expected[token] -= params.presence_penalty + params.frequency_penalty * text.count(token)
    return torch.tensor(expected)


def test_penalties_count_the_text_and_the_drafts_before_a_row():
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5, logprobs=True
    )
    logits, table, prompt, text = _logits(3, seed=8).double(), SamplingTable(VOCAB, "cpu"), (1, 2, 2), [3, 4, 3]
    for seat in (70, 2):  # a table grows with the seats; a seat is written again when another request takes it
        table.update(SamplingInput((seat_sampling(seat, SamplingParams(presence_penalty=1.0)),), ((seat, [5]),)))
        sampling = SamplingInput((seat_sampling(seat, params, prompt=prompt),), ((seat, text[:2]),))
        table.update(sampling)
        table.update(SamplingInput(new_tokens=((seat, text[2:]),)))
        token_ids = torch.tensor([3, 7, 4])  # the newest token, then two drafts
        for row, drafts in enumerate(([], [7], [7, 4])):
            found = logits.clone()
            table.change(found, [RowChange(row, seat, num_drafts=len(drafts))], token_ids)
            expected = _penalized(logits[row], params, prompt, text + drafts)
            assert torch.allclose(found[row], expected.double(), atol=1e-6)
            assert torch.equal(found[:row], logits[:row]) and torch.equal(found[row + 1 :], logits[row + 1 :])
            changed = sampling._replace(changes=tuple(RowChange(r, seat, num_drafts=r) for r in range(3)))
            assert decide(logits, changed, table, token_ids)[row] == expected.argmax()


KINDS = [
    {"logit_bias": {3: 2.0, 7: -1.5}},
    {"repetition_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": 0.5},
    {"repetition_penalty": 0.8, "logit_bias": {1: 4.0}, "min_tokens": 5},
    {"frequency_penalty": -1.0},
    {"min_tokens": 5},
]


def _many_changes(num_rows):
    """A table whose seat n has the options n, and a change of each row; the seats have two drafts in turns."""
    table, generator = SamplingTable(VOCAB, "cpu"), torch.Generator().manual_seed(1)
    texts = [torch.randint(0, VOCAB, (4,), generator=generator).tolist() for _ in range(num_rows)]
    params = [SamplingParams(temperature=0.0, **KINDS[seat % len(KINDS)]) for seat in range(num_rows)]
    penalized = [seat for seat in range(num_rows) if seat % len(KINDS) in (1, 2, 3)]
    table.update(
        SamplingInput(
            tuple(seat_sampling(seat, one, prompt=(1, 2, 2), stop_ids=(0, 9)) for seat, one in enumerate(params)),
            tuple((seat, texts[seat]) for seat in penalized),
        )
    )
    changes = [RowChange(seat, seat, min(seat, 2) * (seat % 2), seat % 3 == 2) for seat in range(num_rows)]
    return table, params, texts, changes


def test_changes_of_many_rows_are_those_of_each_alone():
    table, params, texts, changes = _many_changes(20)
    logits, token_ids = _logits(20, seed=9).double(), torch.arange(20) % VOCAB
    together = logits.clone()
    table.change(together, changes, token_ids)
    for row, (one, change) in enumerate(zip(params, changes, strict=True)):
        alone = logits.clone()
        table.change(alone, [change], token_ids)
        assert torch.equal(alone[row], together[row])
        expected = logits[row].clone()
        for token, bias in one.logit_bias.items():
            expected[token] += bias
        if row % len(KINDS) in (1, 2, 3):
            text = texts[row] + token_ids[row + 1 - change.num_drafts : row + 1].tolist()
            expected = _penalized(expected, one, (1, 2) if one.repetition_penalty != 1.0 else (), text)
        if change.forbids_stops and one.min_tokens:
            expected[[0, 9]] = float("-inf")
        assert torch.allclose(together[row], expected.double(), atol=1e-6)


def test_the_number_of_launches_does_not_depend_on_the_number_of_rows():
    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            counts.append(str(function))
            return function(*arguments, **(options or {}))

    found = []
    for num_rows in (10, 60):
        table, _, _, changes = _many_changes(num_rows)
        logits, token_ids, counts = _logits(num_rows), torch.arange(num_rows) % VOCAB, []
        with Counted():
            table.change(logits, changes, token_ids)
        found.append(len(counts))
    assert found[0] == found[1] > 10


def test_stops_stay_where_no_other_token_is_left():
    """A complete structure may end although the text is shorter than `min_tokens`."""
    table, logits = SamplingTable(VOCAB, "cpu"), _logits(2)
    table.update(SamplingInput((seat_sampling(0, SamplingParams(min_tokens=5), stop_ids=(4,)),)))
    only_stop = torch.arange(VOCAB) == 4
    changes = [
        RowChange(0, 0, forbids_stops=True, allowed_bits=np.packbits(only_stop, bitorder="little")),
        RowChange(1, 0, forbids_stops=True),
    ]
    found = logits.clone()
    table.change(found, changes, torch.zeros(2, dtype=torch.int64))
    assert (found[0] > float("-inf")).tolist() == only_stop.tolist()
    assert (found[1] > float("-inf")).tolist() == (~only_stop).tolist()
