"""A training step through pipeline stages has the loss and every gradient of the same step on one process."""

import pytest
import torch
import torch.distributed as dist
from distributed.processes import run_processes
from distributed.test_equals_one_process import CPU, ROW, WHOLE, Outcome, assert_equal, batches, large_sink_model

from openmimo.model.context import PackedContext, RoutingTape
from openmimo.model.heads import MicroBatch
from openmimo.model.mimo import MiMo
from openmimo.parallel.mesh import build_mesh
from openmimo.parallel.pipeline import gather_from_stages
from openmimo.parallel.ranks import Ranks
from openmimo.parallel.stages import PipelineOptions
from openmimo.train.config import OptimizerConfig
from openmimo.train.loss import loss_of_states
from openmimo.train.optim import build_optimizer, clip_gradients
from openmimo.train.trainer import Alone

ONE = PipelineOptions("1f1b", 2, (), ROW)
UNEVEN = PipelineOptions("1f1b", 2, (1,), ROW)
TWICE = PipelineOptions("interleaved", 4, (1, 2, 4), ROW)
FOUR_STAGES = PipelineOptions("1f1b", 4, (), ROW)
HEADS_ALONE = PipelineOptions("1f1b", 4, (2, 3, 5), ROW)
TWO = [(ONE, {"pp": 2}), (UNEVEN, {"pp": 2}), (TWICE, {"pp": 2})]
FOUR = [
    (FOUR_STAGES, {"pp": 4}), (HEADS_ALONE, {"pp": 4}), (ONE, {"pp": 2}), (TWICE, {"pp": 2}), (ONE, {"pp": 2, "cp": 2}),
    (ONE, {"pp": 2, "tp": 2}), (TWICE, {"pp": 2, "ep": 2}), (ONE, {"pp": 2, "dp_replicate": 2}),
]  # fmt: skip


def step(model: MiMo, ranks: Alone, mine: list[MicroBatch]) -> Outcome:
    counts = ranks.sum_over_rows(torch.stack([batch.label_counts() for batch in mine]).sum(0))
    load: dict[int, torch.Tensor] = {}

    def split(batch: MicroBatch) -> tuple[MicroBatch, PackedContext]:
        tape = RoutingTape(record=True)
        return ranks.split(batch, routing=tape, balance_weight=0.01, balance_length=ROW, z_weight=0.01)

    losses = ranks.backward(
        model,
        mine,
        split=split,
        loss=lambda states, part: loss_of_states(model, states, part, label_counts=counts, mtp_weight=0.3),
        seen=lambda context: context.routing.add_expert_load(load, model.config.moe.num_experts),
    )
    report = clip_gradients(model, 0.5, gradients=ranks.gradients)
    gradients = whole(ranks, {name: parameter.grad for name, parameter in model.named_parameters()})
    optimizer = build_optimizer(model, OptimizerConfig(), mesh_of=ranks.mesh_of)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    updated = whole(ranks, {name: parameter.detach() for name, parameter in model.named_parameters()})
    layers = [layer for layer, kind in enumerate(model.config.layers) if kind.ffn == "moe"]
    none = torch.zeros(model.config.moe.num_experts, dtype=torch.int64)
    load = {layer: ranks.sum_over_stages(ranks.sum(load.get(layer, none))) for layer in layers}
    losses = ranks.sum_over_stages(ranks.sum(losses))
    return Outcome(losses, float(report.norm), int(report.num_zeros), load, gradients, updated)


def whole(ranks: Alone, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if isinstance(ranks, Alone):
        return {name: tensor.clone() for name, tensor in tensors.items()}
    gathered = gather_from_stages(tensors, ranks.mesh.pp.get_group(), CPU)
    return {name: tensor.clone() for name, tensor in gathered}


def steps_on_meshes(meshes: list[tuple[PipelineOptions, dict[str, int]]], recompute: bool) -> list[Outcome]:
    outcomes = []
    for options, sizes in meshes:
        ranks = Ranks(build_mesh("cpu", **WHOLE | sizes), CPU, options)
        model = large_sink_model()
        ranks.apply(model, recompute=recompute)
        outcomes.append(step(model, ranks, batches()[ranks.row_rank :: ranks.num_row_ranks]))
    return outcomes if dist.get_rank() == 0 else []


@pytest.fixture(scope="module")
def alone() -> Outcome:
    return step(large_sink_model(), Alone(CPU), batches())


@pytest.mark.parametrize("recompute", [False, True])
def test_two_processes(tmp_path, alone, recompute):
    meshes = TWO if not recompute else [(TWICE, {"pp": 2})]
    outcomes, _ = run_processes(tmp_path, 2, steps_on_meshes, meshes, recompute)
    for mesh, outcome in zip(meshes, outcomes, strict=True):
        assert_equal(outcome, alone, mesh)


@pytest.mark.slow
def test_four_processes(tmp_path, alone):
    outcomes, *_ = run_processes(tmp_path, 4, steps_on_meshes, FOUR, False)
    for mesh, outcome in zip(FOUR, outcomes, strict=True):
        assert_equal(outcome, alone, mesh)
