"""Every sampling backend draws from the distribution of the definition, token by token, or refuses."""

import math

import pytest
import torch

from openmimo.kernels.operations import SAMPLING, SamplingNeed
from openmimo.kernels.sampling.reference import filtered_probabilities

BACKENDS = dict(SAMPLING.backends())
V = 2500
FILTERS = {  # temperature, top-p, top-k, min-p
    "none": (1.0, 2.0, math.inf, 0.0),
    "temperature": (0.3, 2.0, math.inf, 0.0),
    "top-p": (1.0, 0.9, math.inf, 0.0),
    "small top-p": (0.7, 0.01, math.inf, 0.0),
    "top-k": (1.3, 2.0, 17, 0.0),
    "top-k of one": (1.0, 2.0, 1, 0.0),
    "top-k of all": (1.0, 2.0, V, 0.0),
    "min-p": (1.0, 2.0, math.inf, 0.1),
    "all": (0.8, 0.7, 40, 0.02),
}


def logits_of(kind):
    logits = 3 * torch.randn(6, V, generator=torch.Generator().manual_seed(0))
    if kind == "ties":  # rounded as bfloat16 rounds them
        logits = logits.round()
    if kind == "masked":
        logits[:, 10:] = -math.inf
    if kind == "one left":
        logits[:, :] = -math.inf
        logits[:, 77] = 2.0
    return logits


@pytest.mark.parametrize("kind", ["random", "ties", "masked", "one left"])
@pytest.mark.parametrize("name", BACKENDS)
def test_tokens_are_the_inverse_of_the_cumulative_distribution(name, kind):
    """Every row has filters of its own. Random numbers near a border of two tokens are left out: rounding decides."""
    logits = logits_of(kind)
    if reason := BACKENDS[name].refuse(SamplingNeed(V, logits.dtype, True, True)):
        pytest.skip(reason)
    num_compared = 0
    for first in range(0, len(FILTERS), 3):
        rows = list(FILTERS.values())[first : first + 3] * 2
        numbers = torch.tensor([(*row, 1.0) for row in rows], dtype=torch.float64).T
        exact = filtered_probabilities(logits, numbers, has_filters=True)
        cumulative = (exact / exact.sum(1, keepdim=True)).cumsum(1)
        for seed in range(2):
            uniform = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            found = BACKENDS[name].run.draw(logits, numbers, uniform, True)
            expected = torch.searchsorted(cumulative, uniform[:, None], right=True)[:, 0]
            is_clear = (cumulative - uniform[:, None]).abs().min(1).values > 1e-6
            assert torch.equal(found[is_clear], expected[is_clear])
            assert (exact.gather(1, found[:, None]) > 0).all()
            num_compared += int(is_clear.sum())
    assert num_compared > 25


@pytest.mark.parametrize("name", BACKENDS)
def test_extreme_random_numbers_give_tokens_that_are_kept(name):
    logits = logits_of("ties")
    if reason := BACKENDS[name].refuse(SamplingNeed(V, logits.dtype, True, True)):
        pytest.skip(reason)
    numbers = torch.tensor([(0.8, 0.7, 40, 0.02, 1.0)] * 6, dtype=torch.float64).T
    exact = filtered_probabilities(logits, numbers, has_filters=True)
    for number in (0.0, 1 - 2.0**-52):
        uniform = torch.full((6,), number, dtype=torch.float64)
        found = BACKENDS[name].run.draw(logits, numbers, uniform, True)
        kept = [row.nonzero()[0 if number == 0.0 else -1] for row in exact]
        assert torch.equal(found, torch.cat(kept))
    plain = torch.tensor([(0.8, 2.0, math.inf, 0.0, 1.0)] * 6, dtype=torch.float64).T
    assert torch.equal(
        BACKENDS[name].run.draw(logits, plain, torch.full((6,), 0.4, dtype=torch.float64), False),
        BACKENDS["reference"].run.draw(logits, plain, torch.full((6,), 0.4, dtype=torch.float64), False),
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_log_probabilities_are_those_of_the_softmax(name):
    logits = logits_of("masked")
    logits[:, 2300] = 1.0
    if reason := BACKENDS[name].refuse(SamplingNeed(V, logits.dtype, True, True)):
        pytest.skip(reason)
    tokens, temperature = torch.tensor([2300, 1, 2, 3, 4, 5]), torch.tensor([1.0, 0.5, 2.0] * 2, dtype=torch.float64)
    chosen, ids, values = BACKENDS[name].run.logprobs(logits, tokens, temperature, 4)
    exact = (logits.double() / temperature[:, None]).log_softmax(1)
    assert torch.allclose(chosen.double(), exact.gather(1, tokens[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(values.double(), exact.topk(4).values, atol=1e-5)
    assert torch.equal(ids, exact.topk(4).indices)
    assert BACKENDS[name].run.logprobs(logits, tokens, temperature, 0)[1:] == (None, None)
