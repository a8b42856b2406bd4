"""A prompt that is computed once for all its samples gives the same results as computing it for each."""

import random

import pytest
import torch
from rl_world import policy

from openmimo.core.samples import Sample
from openmimo.kernels.operations import token_logprobs
from openmimo.model.context import RoutingTape
from openmimo.rl.learning.packing import packs


def group(rng, *, prompt, answers, vocabulary):
    """Samples of one prompt; some have a tool's tokens in the middle."""
    begin = [rng.randrange(vocabulary) for _ in range(prompt)]
    samples = []
    for length in answers:
        tokens = begin + [rng.randrange(vocabulary) for _ in range(length)]
        mask = [False] * prompt + [place % 5 != 3 for place in range(length)]
        samples.append(Sample(tokens, mask, [0.0] * len(tokens), [0] * len(tokens)))
    return samples


@pytest.mark.parametrize("num_answers", [2, 12], ids=["few", "many"])
def test_logprobs_and_gradients_are_those_of_whole_samples(num_answers):
    model, rng = policy().double(), random.Random(0)
    vocabulary = model.config.vocab_size
    samples = []
    for prompt in (30, 1, 45):  # well above the window, and below
        answers = [rng.randint(1, 40) for _ in range(num_answers)]
        samples += group(rng, prompt=prompt, answers=answers, vocabulary=vocabulary)
    results = {}
    for shared in (False, True):
        (pack,) = packs(samples, 100_000, device=model.device, share_prompts=shared)
        model.zero_grad()
        states_ND = model(pack.tokens_T, pack.context(RoutingTape())).post_norm_TD[pack.rows_N]
        logprobs_N = token_logprobs(states_ND, model.lm_head.weight, pack.labels_N)
        (logprobs_N * torch.cos(torch.arange(len(logprobs_N), dtype=torch.float64))).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results[shared] = (len(pack.tokens_T), logprobs_N.detach(), gradients)
    whole, shared = results[False], results[True]
    assert shared[0] == whole[0] - (num_answers - 1) * (30 + 1 + 45)
    assert (shared[1] - whole[1]).abs().max() < 1e-10
    for name, gradient in whole[2].items():
        assert (shared[2][name] - gradient).abs().max() <= 1e-9 * gradient.abs().max() + 1e-12, name


def test_only_neighbors_with_the_same_prompt_and_routes_share_it():
    rng = random.Random(1)
    first, second = (group(rng, prompt=9, answers=(4, 5), vocabulary=50) for _ in range(2))
    (pack,) = packs([*first, *second], 1000, device=torch.device("cpu"), share_prompts=True)
    assert [(own.prompt, own.responses) for own in pack.groups] == [(9, (4, 5)), (9, (4, 5))]
    (pack,) = packs([first[0], second[0], first[1]], 1000, device=torch.device("cpu"), share_prompts=True)
    assert [own.responses for own in pack.groups] == [(), (), ()]
    first[0].routed_experts = torch.zeros(12, 1, 2, dtype=torch.uint8).numpy()
    first[1].routed_experts = torch.ones(13, 1, 2, dtype=torch.uint8).numpy()
    (pack,) = packs(first, 1000, device=torch.device("cpu"), share_prompts=True)
    assert [own.responses for own in pack.groups] == [(), ()]
