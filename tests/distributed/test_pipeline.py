"""A training step through pipeline stages has the loss and every gradient of the same step on one process."""

import itertools

import pytest
import torch
import torch.distributed as dist
from distributed.processes import run_processes
from distributed.test_equals_one_process import (
    CPU,
    ROW,
    WHOLE,
    Outcome,
    assert_equal,
    batches,
    head_model,
    large_sink_model,
    preset,
)

from openmimo.core.errors import ConfigError
from openmimo.model.backbone import checkpoint_activations
from openmimo.model.context import PackedContext, RoutingTape
from openmimo.model.heads import MicroBatch
from openmimo.model.mimo import MiMo
from openmimo.model.presets import model_config
from openmimo.parallel.mesh import build_mesh
from openmimo.parallel.pipeline import gather_from_stages
from openmimo.parallel.ranks import Ranks
from openmimo.parallel.stages import PipelineOptions, layer_costs, stage_layers
from openmimo.train.config import OptimizerConfig, ParallelConfig
from openmimo.train.loss import loss_of_states
from openmimo.train.optim import build_optimizer, clip_gradients
from openmimo.train.trainer import Alone

ONE = PipelineOptions("1f1b", 2, (), ROW)
UNEVEN = PipelineOptions("1f1b", 2, (1,), ROW)
TWICE = PipelineOptions("interleaved", 4, (1, 2, 4), ROW)
FOUR_STAGES = PipelineOptions("1f1b", 4, (), ROW)
HEADS_ALONE = PipelineOptions("1f1b", 4, (2, 3, 5), ROW)
TWO = [(ONE, {"pp": 2}), (UNEVEN, {"pp": 2}), (TWICE, {"pp": 2})]
SHORT = [(TWICE, {"pp": 2})]
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
        if recompute:
            checkpoint_activations(model.model)
        ranks.apply(model)
        outcomes.append(step(model, ranks, batches()[ranks.row_rank :: ranks.num_row_ranks]))
    return outcomes if dist.get_rank() == 0 else []


@pytest.fixture(scope="module")
def alone() -> Outcome:
    return step(large_sink_model(), Alone(CPU), batches())


@pytest.mark.parametrize(
    ("meshes", "recompute"),
    [(SHORT, False), pytest.param(TWO, True, marks=pytest.mark.slow)],
)
def test_two_processes(tmp_path, alone, meshes, recompute):
    outcomes, _ = run_processes(tmp_path, 2, steps_on_meshes, meshes, recompute)
    for mesh, outcome in zip(meshes, outcomes, strict=True):
        assert_equal(outcome, alone, mesh)


@pytest.mark.slow
def test_four_processes(tmp_path, alone):
    outcomes, *_ = run_processes(tmp_path, 4, steps_on_meshes, FOUR, False)
    for mesh, outcome in zip(FOUR, outcomes, strict=True):
        assert_equal(outcome, alone, mesh)


def steps_by_heads() -> list[Outcome]:
    ranks = Ranks(build_mesh("cpu", **WHOLE | {"pp": 2, "cp": 2}), CPU, ONE, cp_exchange="heads")
    model = head_model()
    checkpoint_activations(model.model)
    ranks.apply(model)
    return [step(model, ranks, batches())]


@pytest.mark.slow
def test_stages_whose_full_layers_exchange_heads(tmp_path):
    (outcome,), *_ = run_processes(tmp_path, 4, steps_by_heads)
    assert_equal(outcome, step(head_model(), Alone(CPU), batches()), {"pp": 2, "cp": 2})


def other_models(names: list[str]) -> list[Outcome]:
    outcomes = []
    for name in names:
        model, sizes = preset(name), {"pp": 2}
        ranks = Ranks(build_mesh("cpu", **WHOLE | sizes), CPU, PipelineOptions("1f1b", 2, (), ROW))
        ranks.apply(model)
        outcomes.append(step(model, ranks, batches()))
    return outcomes


@pytest.mark.slow
def test_other_kinds_of_layers_on_two_processes(tmp_path):
    """Sparse layers are in the stage of the layer whose keys they read; the states of complex layers are stacked."""
    names = ["tiny_hysparse", "tiny_alibi", "tiny_fairy"]
    outcomes, _ = run_processes(tmp_path, 2, other_models, names)
    for name, outcome in zip(names, outcomes, strict=True):
        for parameter, gradient in step(preset(name), Alone(CPU), batches()).gradients.items():
            error = (outcome.gradients[parameter] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-8)
            assert error < 1e-5, (name, parameter, float(error))


def most_buffers() -> int:
    ranks = Ranks(build_mesh("cpu", **WHOLE | {"pp": 2}), CPU, ONE)
    model = large_sink_model()
    ranks.apply(model)
    most = 0

    def seen(context: PackedContext) -> None:
        nonlocal most
        (schedule,) = model.pipeline._schedules.values()
        received = [info.buffer for infos in schedule._stage.args_recv_info.values() for info in infos]
        most = max(most, sum(buffer is not None and not buffer.is_meta and buffer.numel() > 0 for buffer in received))

    ranks.backward(
        model,
        [*batches(), *batches()],
        split=lambda batch: ranks.split(batch, routing=None, balance_weight=0.0, balance_length=None),
        loss=lambda states, part: loss_of_states(
            model, states, part, label_counts=torch.tensor([100] * 3), mtp_weight=0.3
        ),
        seen=seen,
    )
    return most


@pytest.mark.slow
def test_a_stage_keeps_only_the_states_of_micro_batches_on_their_way(tmp_path):
    assert run_processes(tmp_path, 2, most_buffers) == [0, 1]  # of eight micro-batches


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pp_stages": 2}, "no effect with parallel.pp 1"),
        ({"pp": 2, "pp_stages": 4}, "1f1b schedule has"),
        ({"cp_exchange": "heads"}, "no effect with parallel.cp 1"),
        ({"pp": 2, "pp_schedule": "interleaved", "pp_stages": 3}, "two or more stages for each"),
        ({"pp": 2, "pp_schedule": "interleaved", "pp_stages": 4, "pp_boundaries": (1,)}, "gives 2 stages"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**settings)


@pytest.mark.parametrize(
    ("name", "stages", "boundaries", "message"),
    [
        ("tiny", 2, (9,), "has 9, but the layers are 0 to"),
        ("tiny", 3, (3, 2), "in increasing order"),
        ("tiny_hysparse", 2, (3,), "must be in one stage. Possible boundaries: 5, 6"),
        ("tiny_hysparse", 4, (), "4 pipeline stages are too many"),
    ],
)
def test_stages_that_do_not_fit_are_refused(name, stages, boundaries, message):
    with pytest.raises(ConfigError, match=message):
        stage_layers(model_config(name), stages, sequence_length=ROW, boundaries=boundaries)


def test_the_largest_stage_is_as_small_as_any_division_makes_it():
    config = model_config("tiny")
    *costs, heads = layer_costs(config, ROW)

    def largest(stages: tuple[range, ...]) -> float:
        sums = [sum(costs[index] for index in stage) for stage in stages]
        return max(*sums[:-1], sums[-1] + heads)

    found = stage_layers(config, 3, sequence_length=ROW)
    others = itertools.combinations(range(1, len(config.layers) + 1), 2)
    assert largest(found) == min(
        largest(stage_layers(config, 3, sequence_length=ROW, boundaries=boundaries)) for boundaries in others
    )
    assert [index for stage in found for index in stage] == list(range(len(config.layers)))
