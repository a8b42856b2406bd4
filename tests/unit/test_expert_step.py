"""Optimizer steps by expert, the routers' z-loss and the balance loss over a batch, against plain computations."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_training import run_config

from openmimo.core.errors import ConfigError
from openmimo.model.context import PackedContext, RouterLoss
from openmimo.model.moe import balance_loss, z_loss
from openmimo.train.config import ExpertStepConfig, OptimizerConfig
from openmimo.train.expert_step import ExpertStep
from openmimo.train.optim import build_optimizer
from openmimo.train.pretrain import pretrain


def experts_of(model) -> dict[int, list[torch.Tensor]]:
    return {layer.index: list(layer.mlp.experts.parameters()) for layer in model.model.layers if layer.is_sparse}


def model_with_gradients(seed: int):
    """A model after one AdamW step, so that moments are not zero, with new gradients."""
    model = tiny_model(seed).train()
    optimizer = build_optimizer(model, OptimizerConfig())
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if number == 0:
            optimizer.step()
    return model, optimizer


def loads(model, counts: list[int]) -> dict[int, torch.Tensor]:
    return {layer: torch.tensor(counts) for layer in experts_of(model)}


COUNTS = [0, 6, 2, 0, 4, 4, 0, 0]


def test_idle_experts_keep_weights_and_moments_and_the_others_step_as_adam_does():
    (model, optimizer), (plain, plain_optimizer) = model_with_gradients(0), model_with_gradients(0)
    before = {layer: [weight.detach().clone() for weight in pair] for layer, pair in experts_of(model).items()}
    ExpertStep(model, ExpertStepConfig(keep_idle=True)).step(optimizer, loads(model, COUNTS))
    plain_optimizer.step()
    idle = torch.tensor(COUNTS) == 0
    for layer, pair in experts_of(model).items():
        for number, weight in enumerate(pair):
            other = experts_of(plain)[layer][number]
            assert torch.equal(weight[idle], before[layer][number][idle])
            assert torch.equal(weight[~idle], other[~idle])
            state, other_state = optimizer.state[weight], plain_optimizer.state[other]
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(state[name][~idle], other_state[name][~idle])
                assert not torch.equal(state[name][idle], other_state[name][idle])
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


def test_the_learning_rate_follows_the_share_of_tokens():
    (model, optimizer), (plain, plain_optimizer) = model_with_gradients(1), model_with_gradients(1)
    before = {layer: [weight.detach().clone() for weight in pair] for layer, pair in experts_of(model).items()}
    counts = [1, 64, 2, 2, 2, 2, 2, 5]
    ExpertStep(model, ExpertStepConfig(rate_exponent=0.5)).step(optimizer, loads(model, counts))
    plain_optimizer.step()
    rates = [min(4.0, (count / 10) ** 0.5) for count in counts]
    for layer, pair in experts_of(model).items():
        for number, weight in enumerate(pair):
            for expert, rate in enumerate(rates):
                start = before[layer][number][expert]
                step = experts_of(plain)[layer][number][expert] - start
                torch.testing.assert_close(weight[expert] - start, rate * step, rtol=1e-4, atol=1e-6)


def test_each_expert_is_clipped_by_its_own_norm():
    model, _ = model_with_gradients(2)
    layer, pair = next(iter(experts_of(model).items()))
    for weight in pair:
        weight.grad[3] *= 1e-3
        weight.grad[5] = float("nan")
    expected = [torch.cat([weight.grad[expert].flatten() for weight in pair]).norm().item() for expert in range(8)]
    ExpertStep(model, ExpertStepConfig(clip_norm=0.25)).clip()
    for expert, norm in enumerate(expected):
        clipped = torch.cat([weight.grad[expert].flatten() for weight in pair]).norm().item()
        if expert == 5:
            assert clipped != clipped, "a gradient that is not finite must reach the check of the step"
        else:
            assert clipped == pytest.approx(min(norm, 0.25), rel=1e-4)


def test_z_loss_by_hand_and_its_gradient_reaches_the_router_alone():
    model = tiny_model(3)
    x, weight = torch.randn(9, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    losses = RouterLoss(0.0, torch.zeros(9, dtype=torch.int64), 1, z_weight=1.0)
    expected = sum(float((x[row] @ weight.T).exp().sum().log()) ** 2 for row in range(9)) / 9
    assert float(z_loss(x, weight, losses)) == pytest.approx(expected, rel=1e-5)
    tokens = torch.arange(40)
    plain = model(tokens, PackedContext((40,))).post_norm_TD
    with_loss = model(tokens, PackedContext((40,), z_weight=0.5)).post_norm_TD
    assert torch.equal(plain, with_loss)
    (with_loss * 0).sum().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in model.routers().values())


def test_the_balance_loss_over_a_batch_counts_the_micro_batches_before():
    scores, generator = torch.rand(12, 4), torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(12)])
    sequence = torch.arange(12) // 6
    before = torch.tensor([7, 1, 0, 4])
    losses = RouterLoss(1.0, sequence, 2, load_before={5: before})
    load = before + torch.bincount(ids.flatten(), minlength=4)
    frequency = 4 * load / load.sum()
    probability = (scores / scores.sum(1, keepdim=True)).mean(0)
    assert float(balance_loss(scores, ids, losses, 5)) == pytest.approx(float((frequency * probability).sum()), 1e-5)
    alone = replace(losses, load_before={})
    assert float(balance_loss(scores, ids, alone, 5)) != pytest.approx(
        float(balance_loss(scores, ids, losses, 5)), 1e-5
    )


SETTINGS = {
    "expert_step": ExpertStepConfig(clip_norm=0.1, rate_exponent=0.5, keep_idle=True),
    "z_weight": 1e-3,
    "balance_over": "batch",
    "balance_weight": 1e-2,
}


@pytest.mark.slow
def test_a_run_with_every_setting_resumes_to_the_same_weights(tmp_path, without_figures):
    def run(name: str, **changes) -> Path:
        config = run_config(tmp_path / name, **changes)
        return Path(pretrain(replace(config, stages=(replace(config.stages[0], steps=4, global_batch_size=8),))))

    whole = run("whole", **SETTINGS)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "run" / "model")
    shutil.rmtree(tmp_path / "parts" / "run" / "checkpoints" / "step-00000004")
    assert (run("parts", **SETTINGS) / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (run("plain") / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["expert_step", "z_weight", "balance_over"])
def test_settings_of_experts_are_refused_without_experts(tmp_path, name):
    changes = {key: value for key, value in SETTINGS.items() if key in (name, "balance_weight")}
    with pytest.raises(ConfigError, match=f"{name}.*without experts"):
        pretrain(run_config(tmp_path, **changes, model="mimo_7b"))
