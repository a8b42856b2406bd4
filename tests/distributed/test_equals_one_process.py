"""A training step on several processes has the loss and every gradient of the same step on one."""

import inspect
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from conftest import randomize, tiny_config, tiny_model
from distributed.processes import run_processes

from openmimo.core.errors import ConfigError
from openmimo.model.backbone import checkpoint_activations
from openmimo.model.config import ActivationConfig
from openmimo.model.context import RoutingTape
from openmimo.model.heads import MicroBatch, micro_batch
from openmimo.model.mimo import MiMo
from openmimo.model.presets import model_config
from openmimo.model.weight_formats import train_float8
from openmimo.parallel.mesh import build_mesh
from openmimo.parallel.ranks import Ranks
from openmimo.train.config import OptimizerConfig
from openmimo.train.loss import training_loss
from openmimo.train.optim import build_optimizer, clip_gradients
from openmimo.train.trainer import Alone

CPU = torch.device("cpu")
ROW = 96
WHOLE = {"dp_replicate": 1, "dp_shard": -1, "cp": 1, "tp": 1, "ep": 1}
TWO = [{}, {"dp_replicate": 2, "dp_shard": 1}, {"cp": 2}, {"tp": 2}, {"ep": 2}]
FOUR = [
    {"cp": 4}, {"tp": 4}, {"ep": 4}, {"ep": 2}, {"tp": 2}, {"dp_replicate": 2}, {"tp": 2, "cp": 2},
    {"cp": 2, "ep": 4}, {"cp": 2, "ep": 2}, {"dp_replicate": 2, "dp_shard": 2, "ep": 2}, {"dp_replicate": 2, "tp": 2},
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The results of one training step: losses by head, the norm and zeros of the gradients, and each gradient."""

    losses: torch.Tensor
    norm: float
    num_zeros: int
    load: dict[int, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    updated: dict[str, torch.Tensor]


def large_sink_model() -> MiMo:
    """A window reaches over several chunks of four ranks."""
    return with_large_sinks(tiny_model(mtp_heads=2, window_keys=40))


def with_large_sinks(model: MiMo) -> MiMo:
    """Large sinks show a dropped sink gradient."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "sink" in name:
                tensor *= 3
    return model.train()


def batches() -> list[MicroBatch]:
    """Four micro-batches of two rows: one document, and three of unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = (ROW, 51, 7, ROW - 58)
    return [micro_batch(torch.randint(0, 160, (2 * ROW,), generator=generator), lengths, None, 2) for _ in range(4)]


def step(model: MiMo, ranks: Alone, mine: list[MicroBatch]) -> Outcome:
    counts = ranks.sum_over_rows(torch.stack([batch.label_counts() for batch in mine]).sum(0))
    losses, load = torch.zeros(len(counts)), {}
    tape = RoutingTape(record=True)
    for batch in mine:
        part, context = ranks.split(batch, routing=tape, balance_weight=0.01, balance_length=ROW, z_weight=0.01)
        loss, shares = training_loss(model, part, context, label_counts=counts, mtp_weight=0.3)
        loss.backward()
        losses += shares
        tape.add_expert_load(load, model.config.moe.num_experts)
    report = clip_gradients(model, 0.5, gradients=ranks.gradients)
    gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(), mesh_of=ranks.mesh_of)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    updated = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    load = {layer: ranks.sum(load_E) for layer, load_E in load.items()}
    return Outcome(ranks.sum(losses), float(report.norm), int(report.num_zeros), load, gradients, updated)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def steps_on_meshes(
    meshes: list[dict[str, int]], recompute: bool, activations: ActivationConfig | None = None
) -> list[Outcome]:
    outcomes = []
    for sizes in meshes:
        ranks = Ranks(build_mesh("cpu", **WHOLE | sizes), CPU)
        model = large_sink_model()
        checkpoint_activations(model.model, activations, recompute=recompute)
        ranks.apply(model)
        outcomes.append(step(model, ranks, batches()[ranks.row_rank :: ranks.num_row_ranks]))
    return outcomes if dist.get_rank() == 0 else []


@pytest.fixture(scope="module")
def alone() -> Outcome:
    return step(large_sink_model(), Alone(CPU), batches())


def assert_equal(outcome: Outcome, alone: Outcome, sizes: dict[str, int]) -> None:
    torch.testing.assert_close(outcome.losses, alone.losses, rtol=1e-6, atol=1e-6)
    assert abs(outcome.norm - alone.norm) < 1e-5 * alone.norm, sizes
    assert outcome.num_zeros == alone.num_zeros, sizes
    for layer, load_E in alone.load.items():
        assert torch.equal(outcome.load[layer], load_E), (sizes, layer)
    for name, gradient in alone.gradients.items():
        assert gradient.abs().max() > 0, name
        error = (outcome.gradients[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, (sizes, name, float(error))
        # Adam's first step has the size of the learning rate for any size of the gradient
        assert (outcome.updated[name] - alone.updated[name]).abs().max() < 1e-4, (sizes, name)


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes(tmp_path, alone, recompute):
    meshes = TWO if not recompute else [{"cp": 2, "ep": 2}]
    outcomes, _ = run_processes(tmp_path, 2, steps_on_meshes, meshes, recompute)
    for sizes, outcome in zip(meshes, outcomes, strict=True):
        assert_equal(outcome, alone, sizes)


@pytest.mark.slow
def test_two_processes_that_keep_less(tmp_path, alone):
    """Recomputed layers, chunks of experts whose ranks exchange tokens, and attention that is not called again."""
    keep = ActivationConfig(recompute="but_attention", ffn_chunks=3)
    outcomes, _ = run_processes(tmp_path, 2, steps_on_meshes, [{"cp": 2, "ep": 2}, {"tp": 2}], True, keep)
    for outcome in outcomes:
        assert_equal(outcome, alone, {})


@pytest.mark.slow
def test_four_processes(tmp_path, alone):
    outcomes, *_ = run_processes(tmp_path, 4, steps_on_meshes, FOUR, False)
    for sizes, outcome in zip(FOUR, outcomes, strict=True):
        assert_equal(outcome, alone, sizes)


def head_model() -> MiMo:
    """Full layers and MTP heads with large sinks, with two key/value heads, which four ranks copy."""
    config = tiny_config(mtp_heads=2, window_keys=40)
    full = replace(config.layers[0].attention, sink=True)
    layers = tuple(
        replace(layer, attention=full) if layer.attention.kind == "full" else layer for layer in config.layers
    )
    mtp = replace(config.mtp, attention=full)
    return with_large_sinks(randomize(MiMo(replace(config, layers=layers, mtp=mtp)), 0))


def steps_by_heads(
    meshes: list[dict[str, int]], count: int = 4, activations: ActivationConfig | None = None
) -> list[Outcome]:
    outcomes = []
    for sizes in meshes:
        ranks, model = Ranks(build_mesh("cpu", **WHOLE | sizes), CPU, cp_exchange="heads"), head_model()
        if activations is not None:
            checkpoint_activations(model.model, activations)
        ranks.apply(model)
        outcomes.append(step(model, ranks, batches()[:count][ranks.row_rank :: ranks.num_row_ranks]))
    return outcomes if dist.get_rank() == 0 else []


def test_exchanged_heads_on_two_processes(tmp_path):
    outcomes, _ = run_processes(tmp_path, 2, steps_by_heads, [{"cp": 2}], 1)
    assert_equal(outcomes[0], step(head_model(), Alone(CPU), batches()[:1]), {"cp": 2})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("meshes", "recompute"),
    [
        ([{"cp": 4}, {"cp": 2, "tp": 2}, {"cp": 2, "ep": 4}, {"cp": 2, "dp_shard": 2}], None),
        ([{"cp": 2, "ep": 4}], "layers"),
        ([{"cp": 4}], "but_attention"),
    ],
)
def test_exchanged_heads_on_four_processes(tmp_path, meshes, recompute):
    activations = None if recompute is None else ActivationConfig(recompute=recompute)
    outcomes, *_ = run_processes(tmp_path, 4, steps_by_heads, meshes, 4, activations)
    alone = step(head_model(), Alone(CPU), batches())
    for sizes, outcome in zip(meshes, outcomes, strict=True):
        assert_equal(outcome, alone, sizes)


def steps_in_fp8(meshes: list[dict[str, int]]) -> list[Outcome]:
    outcomes = []
    for sizes in meshes:
        ranks, model = Ranks(build_mesh("cpu", **WHOLE | sizes), CPU), large_sink_model()
        train_float8(model)
        checkpoint_activations(model.model, recompute=sizes == {})
        ranks.apply(model)
        outcomes.append(step(model, ranks, batches()[ranks.row_rank :: ranks.num_row_ranks]))
    return outcomes if dist.get_rank() == 0 else []


@pytest.mark.slow
def test_fp8_on_two_processes(tmp_path):
    """Shards change nothing: weights are quantized when they are whole. Other meshes change the 128 tokens that share a
    scale in the gradient of a weight, and no other code.
    """
    meshes = [{}, {"ep": 2}, {"cp": 2}]
    outcomes, _ = run_processes(tmp_path, 2, steps_in_fp8, meshes)
    model = large_sink_model()
    train_float8(model)
    alone = step(model, Alone(CPU), batches())
    assert_equal(outcomes[0], alone, meshes[0])
    for sizes, outcome in zip(meshes[1:], outcomes[1:], strict=True):
        torch.testing.assert_close(outcome.losses, alone.losses, rtol=1e-3, atol=1e-3)
        for name, gradient in alone.gradients.items():
            error = (outcome.gradients[name] - gradient).norm() / gradient.norm()
            assert error < 0.08, (sizes, name, float(error))


def test_fp8_does_not_divide_layers(tmp_path):
    for message in run_processes(tmp_path, 2, refusals_in_fp8)[0]:
        assert "parallel.tp 1" in message


def refusals_in_fp8() -> list[str]:
    model = large_sink_model()
    train_float8(model)
    with pytest.raises(ConfigError) as error:
        Ranks(build_mesh("cpu", **WHOLE | {"tp": 2}), CPU).apply(model)
    return [str(error.value)]


def other_models(cases: list[tuple[str, str]]) -> list[Outcome]:
    outcomes = []
    for name, exchange in cases:
        model, ranks = preset(name), Ranks(build_mesh("cpu", **WHOLE | {"cp": 2}), CPU, cp_exchange=exchange)
        ranks.apply(model)
        outcomes.append(step(model, ranks, batches()))
    return outcomes


def preset(name: str) -> MiMo:
    model = MiMo(model_config(name))
    model.initialize(torch.Generator().manual_seed(0))
    model.replicate_mtp_heads(2)
    return model.train()


@pytest.mark.slow
def test_other_kinds_of_layers_on_two_processes(tmp_path):
    """Sparse layers read the blocks of a layer before them, whose keys are fetched from other ranks."""
    cases = [(name, "auto") for name in ("tiny_hysparse", "tiny_alibi", "tiny_fairy")]
    cases += [(name, "heads") for name in ("tiny_alibi", "tiny_fairy")]
    outcomes, _ = run_processes(tmp_path, 2, other_models, cases)
    for (name, _), outcome in zip(cases, outcomes, strict=True):
        alone = step(preset(name), Alone(CPU), batches())
        for parameter, gradient in alone.gradients.items():
            error = (outcome.gradients[parameter] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-8)
            assert error < 1e-5, (name, parameter, float(error))


def refusals() -> list[str]:
    messages = []
    for sizes in ({"ep": 2}, {"tp": 2}):
        with pytest.raises(ConfigError, match="real weights|complex-valued"):
            Ranks(build_mesh("cpu", **WHOLE | sizes), CPU).apply(preset("tiny_fairy"))
    for sizes in ({"cp": 4}, {"ep": 3}, {"dp_shard": 3}):
        with pytest.raises(ConfigError) as error:
            build_mesh("cpu", **WHOLE | sizes)
        messages.append(str(error.value))
    by_heads = Ranks(build_mesh("cpu", **WHOLE | {"cp": 2}), CPU, cp_exchange="heads")
    for refuse in (
        lambda: by_heads.check(model_config("tiny_hysparse")),
        lambda: by_heads.apply(preset("tiny_hysparse")),
    ):
        with pytest.raises(ConfigError, match="cp_exchange is heads, but attention layer .* shares its keys"):
            refuse()
    ranks = Ranks(build_mesh("cpu", **WHOLE), CPU)
    with pytest.raises(ConfigError) as error:
        ranks.rows(5)
    messages.append(str(error.value))
    with pytest.raises(ConfigError) as error:
        ranks.check_growth()
    return [*messages, str(error.value)]


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    mesh, experts, shard, rows, growth = run_processes(tmp_path, 2, refusals)[0]
    assert "--nproc-per-node 4" in mesh and "ep is 3" in experts and "--nproc-per-node 3" in shard
    assert "5 rows" in rows and "mtp_heads" in growth


def public_methods(kind: type) -> dict[str, str]:
    methods = inspect.getmembers(kind, inspect.isfunction)
    return {name: str(inspect.signature(method)) for name, method in methods if not name.startswith("_")}


def test_one_process_and_several_have_one_interface():
    """The trainer calls either; `Alone` cannot be a base class, because `parallel` lies below `train`."""
    assert public_methods(Ranks) == public_methods(Alone)
