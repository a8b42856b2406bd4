"""An update of the policy on several processes has the loss and every gradient of the same update on one."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed.processes import run_processes
from distributed.test_equals_one_process import CPU, WHOLE, whole
from rich.console import Console
from rl_runs import source
from rl_world import Scripted, policy, request, roll_out, tokenizer

from openmimo.core.samples import Sample
from openmimo.model.hf import save_model
from openmimo.parallel.mesh import build_mesh
from openmimo.parallel.ranks import Ranks
from openmimo.rl.algorithm import algorithm_of
from openmimo.rl.config import MopdConfig, RlConfig
from openmimo.rl.learner import LocalLearner
from openmimo.rl.learning.policy_trainer import UpdateReport
from openmimo.rl.ranks.lead import Crew, Lead
from openmimo.rl.ranks.member import Member, follow
from openmimo.rl.ranks.orders import Channel
from openmimo.train.checkpoint import Progress
from openmimo.train.config import OptimizerConfig

TWO = [{}, {"dp_replicate": 2, "dp_shard": 1}, {"tp": 2}]
FOUR = [{}, {"ep": 4}, {"tp": 2, "ep": 2}]


@dataclass(frozen=True)
class Outcome:
    """Log-probabilities before an update, its report and gradients, and what the engine has after it."""

    logprobs: list[np.ndarray]
    report: UpdateReport
    gradients: dict[str, torch.Tensor]
    engine: dict[str, torch.Tensor]
    teachers: dict[str, float]


def samples() -> list[Sample]:
    """Three groups of two domains, of which one has an odd number of samples, with the routes of another policy."""
    requests = (request(number, samples=3, max_answer_tokens=14) for number in range(3))
    found = roll_out(policy(3), lambda own: Scripted(), *requests)
    domains = ["letters"] * 6 + ["sort"] * 3
    return [
        replace(sample, domain=domain, reward=float(number % 3 == 0))
        for number, (sample, domain) in enumerate(zip(found, domains, strict=True))
    ]


def config_of(name: str, folder: Path, **changes) -> RlConfig:
    shared = {
        "optimizer": OptimizerConfig(weight_decay=0.0, clip_norm=1e9),
        "tokens_per_microbatch": 80,
        "sources": (source(), source("sort")),
        "bias_rate": 1e-2,
        "mtp_weight": 0.3,
        "device": "cpu",
        "dtype": "float32",
    } | changes
    if name == "grpo":
        return RlConfig(str(folder / "student"), str(folder / "run"), **shared)
    teachers = {"letters": str(folder / "teacher"), "sort": "self"}
    return MopdConfig(str(folder / "student"), str(folder / "run"), teachers=teachers, **shared)


def update(learner, trainer, config: RlConfig, annotated: list[Sample]) -> Outcome:
    """Annotates samples, and takes a step on them; `trainer` is the one with the parameters."""
    algorithm, options = algorithm_of(config)
    logprobs = learner.trainer.logprobs(annotated)
    if learner.distillation is not None:
        learner.distillation.annotate(annotated, learner.trainer, algorithm, options)
    else:
        algorithm.annotate(annotated, options, [[] for _ in annotated])
    report = learner.trainer.update(
        annotated, learner.objective(), learning_rate=1e-3, version=0, old_logprobs=logprobs,
        pack_key=lambda sample: sample.domain if learner.distillation else "", gate={"low": 0.5, "high": 2.0},
    )  # fmt: skip
    learner.update_weights(1)
    weights = {name: tensor.clone() for name, tensor in learner.engine.model.state_dict().items()}
    saved, _ = learner.saved()
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.state_dict().items())
    teachers = learner.distillation.metrics() if learner.distillation else {}
    return Outcome(logprobs, report, trainer.kept, weights, teachers)


def keep_gradients(trainer) -> None:
    """Makes a trainer keep the gradients of its step, whole."""
    real = trainer.optimizer.step

    def step():
        named = trainer.model.named_parameters()
        trainer.kept = {name: whole(own.grad) for name, own in named if own.grad is not None}
        real()

    trainer.optimizer.step = step


def alone(config: RlConfig) -> Outcome:
    learner = LocalLearner(
        config, policy(0, mtp_heads=2), tokenizer(), start=Progress.beginning(), console=Console(quiet=True)
    )
    keep_gradients(learner.trainer)
    return update(learner, learner.trainer, config, samples())


def on_ranks(config: RlConfig, meshes: list[dict[str, int]], placements: list[str]) -> list[Outcome]:
    outcomes = []
    for sizes, placement in zip(meshes, placements, strict=True):
        ranks, channel = Ranks(build_mesh("cpu", **WHOLE | sizes), CPU), Channel()
        member = Member(
            config, policy(0, mtp_heads=2), tokenizer(), ranks, start=Progress.beginning(), optimizer_tensors=None,
            placement=placement, console=Console(quiet=True),
        )  # fmt: skip
        keep_gradients(member.learner.trainer)
        row_ranks: list[int] = [0] * channel.count
        dist.all_gather_object(row_ranks, ranks.row_rank)
        if not ranks.is_main:
            follow(member, channel)
            continue
        crew = Crew(member, channel, row_ranks)
        outcomes.append(update(Lead(crew), member.learner.trainer, config, samples()))
        crew.end(has_failed=False)
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 0), ("teacher", 5)):
        save_model(policy(seed, mtp_heads=2), path / name)
        tokenizer().save(path / name)
    return path


def assert_equal(found: Outcome, expected: Outcome, what: object) -> None:
    for own, other in zip(found.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)
    report, other = found.report, expected.report
    assert report.loss == pytest.approx(other.loss, rel=1e-5, abs=1e-6), what
    assert report.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-5), what
    assert (report.num_tokens, report.num_zero_gradients) == (other.num_tokens, other.num_zero_gradients), what
    assert report.diagnostics == pytest.approx(other.diagnostics, rel=1e-4, abs=1e-5), what
    assert report.gradient_shares == pytest.approx(other.gradient_shares, rel=1e-4), what
    assert found.teachers == pytest.approx(expected.teachers, rel=1e-4), what
    for layer, load_E in other.load.items():
        assert torch.equal(report.load[layer], load_E), (what, layer)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        error = (found.gradients[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-8)
        assert error < 1e-5, (what, name, float(error))
    for name, weight in expected.engine.items():
        # Adam's first step has the size of the learning rate (1e-3) for any size of the gradient
        assert (found.engine[name] - weight).abs().max() < 3e-4, (what, name)


def compare(tmp_path: Path, count: int, config: RlConfig, meshes: list[dict[str, int]], placements: list[str]) -> None:
    expected = alone(config)
    assert max(float(gradient.abs().max()) for gradient in expected.gradients.values()) > 0
    outcomes, *_ = run_processes(tmp_path, count, on_ranks, config, meshes, placements)
    for sizes, placement, outcome in zip(meshes, placements, outcomes, strict=True):
        assert_equal(outcome, expected, (sizes, placement))


@pytest.mark.slow
def test_reinforcement_with_experts_on_two_processes(tmp_path, folder):
    compare(tmp_path, 2, config_of("grpo", folder), [{"ep": 2}], ["resident"])


@pytest.mark.slow
def test_reinforcement_on_two_processes(tmp_path, folder):
    compare(tmp_path, 2, config_of("grpo", folder), TWO, ["resident"] * len(TWO))


@pytest.mark.slow
def test_distillation_on_two_processes(tmp_path, folder):
    compare(tmp_path, 2, config_of("mopd", folder), [{}] * 4, ["resident", "turns", "spread", "sharded"])


@pytest.mark.slow
def test_reinforcement_on_four_processes(tmp_path, folder):
    config = config_of("grpo", folder, activation_checkpointing=True)
    compare(tmp_path, 4, config, FOUR, ["resident"] * len(FOUR))


@pytest.mark.slow
def test_divergence_from_teachers_on_two_processes(tmp_path, folder):
    config = config_of("mopd", folder, signal="full")
    compare(tmp_path, 2, config, [{}, {"tp": 2}], ["turns", "sharded"])
