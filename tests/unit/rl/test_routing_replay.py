"""R3: the trainer routes like the engine, and its router still gets gradients (paper section 4.6.1)."""

import copy
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rl_world import Scripted, policy, request, roll_out, words

from openmimo.core.records import Message
from openmimo.core.samples import Sample
from openmimo.model.backbone import checkpoint_activations
from openmimo.model.context import PackedContext, RoutingTape
from openmimo.model.presets import flash
from openmimo.rl.agents.environment import EnvResponse
from openmimo.rl.learning.packing import NOT_RECORDED, pack_samples, packs, replayed_routes
from openmimo.rl.learning.policy_trainer import PolicyTrainer, score_samples, weighted_sum
from openmimo.rl.losses.tokens import mismatch
from openmimo.train.config import OptimizerConfig

TWO_TURNS = (Message("tool", words(12)),)


@torch.no_grad()
def engine_copy(model, *, bias_noise=0.0, weight_noise=0.0, seed=0):
    """Copies the policy with noise in its routers: `bias_noise` changes the choice, `weight_noise` the scores too."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for router in other.routers().values():
        for tensor, noise in ((router.e_score_correction_bias, bias_noise), (router.weight, weight_noise)):
            tensor += noise * torch.randn(tensor.shape, generator=generator)
    return other


def roll_out_with(engine_model, *, samples=6, seed=0, open_episode=lambda own: Scripted()):
    requests = [request(number, samples=samples, max_answer_tokens=24) for number in (0, 1)]
    return roll_out(engine_model, open_episode, *requests, seed=seed)


def distances(model, samples, *, replay, **options):
    scores = score_samples(model, samples, replay=replay, **options)
    written = [
        (ours, theirs)
        for sample, own in zip(samples, scores, strict=True)
        for ours, theirs, is_in in zip(own, sample.logprobs, sample.loss_mask, strict=True)
        if is_in
    ]
    return mismatch(*torch.tensor(written).T)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world():
    """A policy, and samples of an engine that chooses other experts."""
    model = policy(1, num_layers=3, ends=1.0)
    return model, roll_out_with(engine_copy(model, bias_noise=0.3))


def test_another_choice_of_experts_is_made_good_exactly():
    for seed in range(3):
        model = policy(seed, num_layers=5, ends=1.0)
        samples = roll_out_with(engine_copy(model, bias_noise=0.3, seed=seed), seed=seed)
        off, on = (distances(model, samples, replay=replay) for replay in (False, True))
        assert off["extreme_ratio_share_2"] > 0.05
        assert off["mismatch_k3"] > 0.05
        assert on["logprob_difference_max"] <= 1e-5
        assert on["extreme_ratio_share_2"] == 0.0


def test_what_noise_in_the_router_does_falls_at_least_fivefold():
    """The rest comes from the gate weights, which the trainer computes itself."""
    results = {True: [], False: []}
    for seed in range(3):
        model = policy(seed, num_layers=5, ends=1.0)
        samples = roll_out_with(engine_copy(model, weight_noise=0.05, seed=seed), seed=seed)
        for replay in results:
            found = distances(model, samples, replay=replay)
            results[replay].append((found["mismatch_k3"], found["extreme_ratio_share_2"]))
    (k3_on, extreme_on), (k3_off, extreme_off) = (np.mean(results[replay], axis=0) for replay in (True, False))
    assert extreme_off > 0.02
    assert extreme_off >= 5 * extreme_on
    assert k3_off >= 5 * k3_on > 0


def test_the_routes_of_many_turns_are_replayed():
    model = policy(2)
    engine_model = engine_copy(model, bias_noise=0.3)
    samples = roll_out_with(engine_model, open_episode=lambda own: Scripted(EnvResponse(messages=TWO_TURNS)))
    assert max(sample.info["turns"] for sample in samples) == 2
    assert distances(model, samples, replay=True)["logprob_difference_max"] <= 1e-5
    assert distances(model, samples, replay=False)["logprob_difference_max"] > 0.1


def test_neither_packs_nor_their_order_matter(world):
    model, samples = world
    for order in (samples, samples[::-1], samples[1::2] + samples[::2]):
        for size in (1, 200, 10_000):
            assert distances(model, order, replay=True, tokens_per_microbatch=size)["logprob_difference_max"] <= 1e-5


def test_routes_are_bytes_and_have_no_row_for_the_last_token(world):
    model, samples = world
    layers = sorted(model.routers())
    (pack,) = packs(samples[:3], 10_000, device=model.device)
    routes = replayed_routes(model, pack.samples)
    assert sorted(routes) == layers
    start = 0
    for sample in pack.samples:
        length = len(sample.token_ids)
        assert sample.routed_experts.dtype == np.uint8
        assert sample.routed_experts.shape == (length - 1, len(layers), model.config.moe.experts_per_token)
        for place, layer in enumerate(layers):
            own = routes[layer][start : start + length]
            assert np.array_equal(own[:-1], sample.routed_experts[:, place])
            assert (own[-1] == NOT_RECORDED).all()
        start += length


def test_rows_that_are_not_known_are_routed_by_the_router_itself(world):
    """Routing is replayed token by token: known rows of the pack keep their recorded routes."""
    model, samples = world
    sample = replace(samples[0], routed_experts=samples[0].routed_experts.astype(np.int16))
    unknown = np.zeros(len(sample.routed_experts), dtype=bool)
    unknown[3::4] = True
    sample.routed_experts[unknown] = NOT_RECORDED
    recorded = {}
    for name, own in (("replayed", [sample]), ("none", [replace(sample, routed_experts=None)])):
        (pack,) = packs(own, 10_000, device=model.device)
        tape = RoutingTape(record=True, replayed=replayed_routes(model, pack.samples))
        with torch.no_grad():
            model(pack.tokens_T, PackedContext(pack.lengths, routing=tape))
        recorded[name] = tape.recorded
    first = min(model.routers())  # after the first router the states differ
    replayed, plain = recorded["replayed"][first][:-1].numpy(), recorded["none"][first][:-1].numpy()
    assert np.array_equal(replayed[unknown], plain[unknown])
    assert np.array_equal(replayed[~unknown], sample.routed_experts[~unknown, 0])
    assert not np.array_equal(plain[~unknown], sample.routed_experts[~unknown, 0])
    whole = replace(sample, routed_experts=np.full_like(sample.routed_experts, NOT_RECORDED))
    assert score_samples(model, [whole])[0] == pytest.approx(score_samples(model, [whole], replay=False)[0], abs=1e-5)
    mixed = score_samples(model, [whole, samples[1], replace(samples[2], routed_experts=None)])
    apart = [
        *score_samples(model, [whole], replay=False),
        *score_samples(model, [samples[1]]),
        *score_samples(model, [samples[2]], replay=False),
    ]
    for ours, expected in zip(mixed, apart, strict=True):
        assert ours == pytest.approx(expected, abs=1e-5)


def test_routes_of_another_model_are_refused(world):
    model, samples = world
    wrong = replace(samples[0], routed_experts=samples[0].routed_experts[:, :1])
    with pytest.raises(ValueError, match="routes of shape"):
        score_samples(model, [wrong])


def annotated(samples):
    return [
        replace(
            sample,
            advantages=[1.0 + 0.1 * place for place in range(len(sample.token_ids))],
            weights=[0.1 * is_in for is_in in sample.loss_mask],
        )
        for sample in samples
    ]


def gradients_of(model, samples, *, checkpointing=False, replay_routing=True):
    """Returns the gradients of one policy-gradient step, before any clipping, and its report."""
    model = copy.deepcopy(model)
    if checkpointing:
        checkpoint_activations(model.model)
    trainer = PolicyTrainer(
        model, OptimizerConfig(clip_norm=1e9), tokens_per_microbatch=150, replay_routing=replay_routing
    )
    kept = {}
    trainer.optimizer.step = lambda: kept.update(
        {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}
    )
    objective = weighted_sum(lambda batch: -batch.advantages_N * batch.logprobs_N)
    report = trainer.update(annotated(samples), objective, learning_rate=0.0, version=0)
    return kept, report


def test_gradients_reach_the_router_also_for_experts_it_would_not_have_chosen(world):
    model, samples = world
    model = copy.deepcopy(model)
    layer, router = next(iter(model.routers().items()))
    with torch.no_grad():
        router.e_score_correction_bias[0] -= 100.0  # the trainer's own router never chooses this expert
    samples = [replace(sample, routed_experts=sample.routed_experts.copy()) for sample in samples]
    for sample in samples:
        sample.routed_experts[:, 0] = (0, 1)  # the engine always chose it
    off, report_off = gradients_of(model, samples, replay_routing=False)
    on, report_on = gradients_of(model, samples)
    name = f"model.layers.{layer}.mlp"
    assert report_off.load[layer][0] == 0
    assert not off[f"{name}.gate.weight"][0].any()
    assert on[f"{name}.gate.weight"][0].abs().max() > 1e-4
    assert on[f"{name}.gate.weight"][1].abs().max() > 1e-4
    assert not on[f"{name}.gate.weight"][2:].any()
    assert on[f"{name}.experts.down_proj"][0].abs().max() > 1e-4
    assert not on[f"{name}.experts.down_proj"][2:].any()


def test_the_routers_gradient_is_that_of_the_gates(world):
    """Compares with finite differences of the loss with the routes held fixed."""
    model, samples = world
    model = copy.deepcopy(model).double()
    samples = annotated(samples[:2])
    (pack,) = packs(samples, 10_000, device=model.device)
    layer, router = list(model.routers().items())[-1]

    def loss():
        tape = RoutingTape(replayed=replayed_routes(model, pack.samples))
        states_ND = model(pack.tokens_T, PackedContext(pack.lengths, routing=tape)).post_norm_TD[pack.rows_N]
        return -model.head(states_ND).log_softmax(-1).gather(1, pack.labels_N[:, None]).mean()

    loss().backward()
    expert = int(samples[0].routed_experts[0, -1, 0])
    direction = torch.randn(router.weight.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = float(router.weight.grad[expert] @ direction)
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            router.weight[expert] += step * direction
            values.append(float(loss()))
            router.weight[expert] -= step * direction
    assert abs(expected) > 1e-6
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(expected, rel=1e-4)


def test_what_is_computed_again_in_the_backward_pass_is_routed_the_same(world):
    model, samples = world
    plain, report = gradients_of(model, samples)
    again, report_again = gradients_of(model, samples, checkpointing=True)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)
    for layer, load_E in report.load.items():
        assert torch.equal(load_E, report_again.load[layer])


def test_the_selection_bias_follows_the_replayed_load(world):
    model, samples = copy.deepcopy(world[0]), world[1][:1]  # one sample, because tokens of a shared prompt count once
    before = {layer: router.e_score_correction_bias.clone() for layer, router in model.routers().items()}
    trainer = PolicyTrainer(model, OptimizerConfig(), tokens_per_microbatch=150, bias_rate=0.01)
    objective = weighted_sum(lambda batch: -batch.advantages_N * batch.logprobs_N)
    report = trainer.update(annotated(samples), objective, learning_rate=0.0, version=0)
    num_experts = model.config.moe.num_experts
    for place, (layer, router) in enumerate(model.routers().items()):
        replayed_E = sum(
            np.bincount(sample.routed_experts[:, place].flatten(), minlength=num_experts) for sample in samples
        )
        own_E = report.load[layer].numpy() - replayed_E  # the last token of each sample, which no engine read
        assert own_E.min() >= 0
        assert own_E.sum() == len(samples) * model.config.moe.experts_per_token
        step_E = 0.01 * torch.sign(report.load[layer].float().mean() - report.load[layer])
        expected_E = before[layer] + step_E - step_E.mean()
        torch.testing.assert_close(router.e_score_correction_bias, expected_E)


def test_memory_to_pack_a_sample_grows_with_its_length_and_is_that_of_small_integers():
    """Routes of 47 layers and 8 experts stay int16; only the router works with int64."""
    model = SimpleNamespace(routers=lambda: dict.fromkeys(range(47)), config=flash(), device="cpu")
    peaks = []
    for length in (4000, 8000):
        sample = Sample(
            np.arange(length), np.arange(length) > 10, np.zeros(length), np.zeros(length, np.int32),
            routed_experts=np.zeros((length - 1, 47, 8), np.uint8),
        )  # fmt: skip
        tracemalloc.start()
        pack = pack_samples([sample], device=torch.device("cpu"))
        assert pack.routes(model)[46].shape == (length, 8)
        peaks.append(tracemalloc.get_traced_memory()[1] / length)
        tracemalloc.stop()
    assert max(peaks) < 2 * 47 * 8 + 200
    assert peaks[1] < 1.05 * peaks[0]
