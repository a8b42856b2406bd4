"""Embedding, output head and loss of which each rank has some tokens, against those of one process."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import randomize, tiny_config
from distributed.processes import run_processes
from distributed.test_equals_one_process import CPU, ROW, WHOLE, Outcome, assert_equal, batches, step, whole

from openmimo.core.errors import ConfigError
from openmimo.data.loader import Batch
from openmimo.kernels.operations import token_logprobs
from openmimo.model.config import ModelConfig
from openmimo.model.heads import Head, MicroBatch, micro_batch
from openmimo.model.mimo import MiMo
from openmimo.parallel.mesh import build_mesh
from openmimo.parallel.ranks import Ranks
from openmimo.train.loss import Evaluation, evaluate
from openmimo.train.trainer import Alone


def uneven_model(vocab_size: int = 161, num_layers: int = 5) -> MiMo:
    config = replace(tiny_config(mtp_heads=2, window_keys=40, num_layers=num_layers), vocab_size=vocab_size)
    return randomize(MiMo(config), 0).train()


def masked() -> list[MicroBatch]:
    """Micro-batches with labels on some tokens only, one without any label, as in fine-tuning."""
    mixed = []
    for number, batch in enumerate(batches()):
        generator = torch.Generator().manual_seed(number)
        mask_T = torch.rand(len(batch.tokens_T), generator=generator) < (0.0 if number == 2 else 0.4)
        mixed.append(micro_batch(batch.tokens_T, batch.document_lengths, mask_T, 2))
    return mixed


def steps_with_uneven_vocabulary(meshes: list[dict[str, int]]) -> list[Outcome]:
    outcomes = []
    for sizes in meshes:
        ranks, model = Ranks(build_mesh("cpu", **WHOLE | sizes), CPU), uneven_model()
        ranks.apply(model)
        outcomes.append(step(model, ranks, masked()[ranks.row_rank :: ranks.num_row_ranks]))
    return outcomes


@pytest.fixture(scope="module")
def alone() -> Outcome:
    return step(uneven_model(), Alone(CPU), masked())


@pytest.mark.slow
def test_two_processes_with_an_uneven_vocabulary(tmp_path, alone):
    (outcome,), *_ = run_processes(tmp_path, 2, steps_with_uneven_vocabulary, [{"tp": 2}])
    assert_equal(outcome, alone, {"tp": 2})


@pytest.mark.slow
def test_four_processes_with_an_uneven_vocabulary(tmp_path, alone):
    meshes = [{"tp": 4}, {"tp": 2}, {"tp": 2, "cp": 2}, {"tp": 2, "dp_replicate": 2}]
    outcomes, *_ = run_processes(tmp_path, 4, steps_with_uneven_vocabulary, meshes)
    for sizes, outcome in zip(meshes, outcomes, strict=True):
        assert_equal(outcome, alone, sizes)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    states_TD = torch.randn(1200, 64, generator=generator).to(dtype)  # more than two tiles
    labels_T = torch.randint(-1, 161, (1200,), generator=generator)
    temperature_T = 0.5 + torch.rand(1200, generator=generator)
    return states_TD.requires_grad_(), labels_T, temperature_T


def read_head(head: Head, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All uses of a head, and their gradients."""
    states_TD, labels_T, temperature_T = inputs(dtype)
    results = {"argmax": head.argmax(states_TD), "cold": head.logprobs(states_TD, labels_T, 0.7).detach()}
    weights_T = torch.linspace(-1, 1, len(labels_T))
    uses = {
        "logprobs": lambda: (head.logprobs(states_TD, labels_T, temperature_T) * weights_T).sum(),
        "loss": lambda: 3 * head.loss(states_TD, labels_T, weights_T),
        "none": lambda: head.loss(states_TD, torch.full_like(labels_T, -1), weights_T),
        "logits": lambda: (head(states_TD).sin() * weights_T[:, None]).sum(),
        "reader": lambda: head(states_TD, functools.partial(reader, labels_T=labels_T)),
    }
    for name, use in uses.items():
        states_TD.grad = head.weight.grad = None
        value = use()
        value.backward()
        results |= {name: value.detach(), f"{name}/states": states_TD.grad, f"{name}/weight": whole(head.weight.grad)}
    return results


def reader(states_TD, weight_VD, labels_T):
    return token_logprobs(states_TD, weight_VD, labels_T, temperature=2.0).square().sum()


def read_divided_head(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = uneven_model(num_layers=1).to(dtype)
    Ranks(build_mesh("cpu", **WHOLE | {"tp": dist.get_world_size()}), CPU).apply(model)
    return read_head(model.head, dtype)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_use_of_the_head(tmp_path, processes):
    expected = read_head(uneven_model(num_layers=1).head, torch.float32)
    for results in run_processes(tmp_path, processes, read_divided_head, torch.float32):
        for name, tensor in expected.items():
            scale = tensor.abs().max().clamp(min=1e-6) if tensor.is_floating_point() else 1
            assert (results[name] - tensor).abs().max() <= 1e-5 * scale, name


def tied_config() -> ModelConfig:
    return replace(tiny_config(mtp_heads=2, window_keys=40), tie_embeddings=True)


def tied_model() -> MiMo:
    model = MiMo(tied_config())
    model.initialize(torch.Generator().manual_seed(2))
    return model.train()


def steps_with_tied_embeddings(meshes: list[dict[str, int]]) -> list[tuple[Outcome, Evaluation]]:
    outcomes = []
    for sizes in meshes:
        ranks = Ranks(build_mesh("cpu", **WHOLE | sizes), CPU)
        model = ranks.draw(tied_config(), 2).train()
        ranks.apply(model)
        names = [name for name, _ in model.named_parameters()]
        evaluation = evaluate(model, held_out(), ROW)
        assert names == [name for name, tensor in model.named_parameters() if hasattr(tensor, "full_tensor")]
        outcomes.append((step(model.train(), ranks, batches()[ranks.row_rank :: ranks.num_row_ranks]), evaluation))
    return outcomes


def held_out() -> list[Batch]:
    return [Batch(batches()[0].tokens_T.numpy(), (ROW, 51, 7, ROW - 58), None, {})]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "meshes"), [(2, [{}, {"tp": 2}, {"ep": 2}]), (4, [{"tp": 2}, {"cp": 2}])])
def test_tied_embeddings(tmp_path, processes, meshes):
    model = tied_model()
    evaluation, alone = evaluate(model, held_out(), ROW), step(model.train(), Alone(CPU), batches())
    assert "lm_head.weight" not in alone.gradients
    outcomes, *_ = run_processes(tmp_path, processes, steps_with_tied_embeddings, meshes)
    for sizes, (outcome, evaluated) in zip(meshes, outcomes, strict=True):
        assert_equal(outcome, alone, sizes)
        assert evaluated.losses == pytest.approx(evaluation.losses, rel=1e-5), sizes


def tokens_without_a_rank() -> str:
    ranks = Ranks(build_mesh("cpu", **WHOLE | {"tp": 4}), CPU)
    with pytest.raises(ConfigError) as error:
        ranks.apply(uneven_model(vocab_size=9, num_layers=1))
    return str(error.value)


@pytest.mark.slow
def test_a_rank_without_tokens_is_refused(tmp_path):
    assert "tp is 4, but 9 tokens" in run_processes(tmp_path, 4, tokens_without_a_rank)[0]
