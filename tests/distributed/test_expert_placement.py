"""Experts that move between ranks change no loss, gradient, weight, moment, recorded route or checkpoint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from distributed.processes import run_processes
from distributed.test_runs import recipe, run  # noqa: F401

import openmimo
from openmimo.core.errors import ConfigError
from openmimo.core.load_trace import LoadTraceWriter
from openmimo.core.metrics import read_metrics
from openmimo.model.context import RoutingTape
from openmimo.model.heads import MicroBatch, micro_batch
from openmimo.parallel.expert_load.placement import max_over_mean
from openmimo.parallel.expert_placement import ExpertPlacement, read_placement
from openmimo.parallel.mesh import build_mesh
from openmimo.parallel.ranks import Ranks
from openmimo.train.checkpoint import optimizer_state
from openmimo.train.config import OptimizerConfig, ParallelConfig
from openmimo.train.loss import training_loss
from openmimo.train.optim import build_optimizer, clip_gradients

CPU = torch.device("cpu")
ROW, STEPS = 48, 3
WHOLE = {"dp_replicate": 1, "dp_shard": -1, "cp": 1, "tp": 1}


def batch(step: int, rank: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return micro_batch(torch.randint(0, 160, (ROW,), generator=generator), (31, ROW - 31), None, 0)


def reversed_file(folder: Path) -> str:
    """In layers of odd index, experts in reverse order; in others, neighbors exchanged."""
    config = tiny_model().config
    experts = np.arange(config.moe.num_experts)
    sparse = [index for index, layer in enumerate(config.layers) if layer.ffn == "moe"]
    slots = {str(layer): (experts[::-1] if layer % 2 else experts ^ 1).tolist() for layer in sparse}
    path = folder / "placement.json"
    path.write_text(json.dumps(slots))
    return str(path)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def train(sizes: dict[str, int], source: str, folder: str) -> tuple[list, dict, dict, list[dict]]:
    """Three steps. With a placement, the experts move after the first, home and back after the second."""
    ranks, model = Ranks(build_mesh("cpu", **WHOLE | sizes), CPU), tiny_model().train()
    ranks.apply(model)
    optimizer = build_optimizer(model, OptimizerConfig(), mesh_of=ranks.mesh_of)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    placement = None
    if source != "off":
        placement = ExpertPlacement(
            model, optimizer, ranks=ranks, source=source, every_steps=1, predictor="last_value", run_folder=Path(folder)
        )
    seen, moves = [], []
    for step in range(STEPS):
        part, tape = batch(step, ranks.row_rank), RoutingTape(record=True)
        counts = ranks.sum_over_rows(part.label_counts())
        split, context = ranks.split(part, routing=tape, balance_weight=0.01, balance_length=ROW)
        loss, shares = training_loss(model, split, context, label_counts=counts, mtp_weight=0.3)
        loss.backward()
        report = clip_gradients(model, 0.5, gradients=ranks.gradients)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append((ranks.sum(shares), report.norm, {layer: ids.clone() for layer, ids in tape.recorded.items()}))
        if placement is not None and step == 0:
            if source == "forecast":
                moves.append(placement.after_step(1))
            placement.begin(1)
        if placement is not None and step == 1:
            with placement.global_order():
                first = optimizer_state(model, optimizer)
                moves.append({name: whole(tensor) for name, tensor in first.items()})
    if placement is not None:
        placement.end()
    state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    moments = {name: whole(tensor) for name, tensor in optimizer_state(model, optimizer).items()}
    return seen, state, moments, moves


def train_each(sizes: dict[str, int], sources: list[str], folder: str) -> list[tuple]:
    return [train(sizes, source, folder) for source in sources]


def assert_same(plain: tuple, placed: tuple) -> None:
    for (losses_a, norm_a, routes_a), (losses_b, norm_b, routes_b) in zip(plain[0], placed[0], strict=True):
        torch.testing.assert_close(losses_b, losses_a, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(norm_b, norm_a, rtol=1e-6, atol=1e-6)
        assert all(torch.equal(routes_b[layer], ids) for layer, ids in routes_a.items())
    for index in (1, 2):
        assert plain[index].keys() == placed[index].keys()
        for name, tensor in plain[index].items():
            torch.testing.assert_close(placed[index][name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def write_trace(folder: Path) -> np.ndarray:
    """One step in which the first half of the experts got nine times the tokens of the others."""
    config = tiny_model().config
    layers = [index for index, layer in enumerate(config.layers) if layer.ffn == "moe"]
    E, A = config.moe.num_experts, config.moe.experts_per_token
    counts = np.tile(np.where(np.arange(E) < E // 2, 9, 1), (len(layers), 1))
    writer = LoadTraceWriter(folder, layers=layers, num_experts=E, experts_per_token=A, most_tokens=99, after_step=-1)
    writer.write(1, counts)
    return counts


def test_placements_of_two_processes(tmp_path):
    counts = write_trace(tmp_path)
    sources = ["off", reversed_file(tmp_path), "forecast"]
    for plain, from_file, forecast in run_processes(tmp_path, 2, train_each, {"ep": 2}, sources, str(tmp_path)):
        assert_same(plain, from_file)
        assert_same(plain, forecast)
        # the step after the first has the same bits, because no sum of the forward pass has another order
        assert torch.equal(plain[0][1][0], from_file[0][1][0])
        L, E = counts.shape
        move, home = forecast[3][0], np.tile(np.arange(E), (L, 1))
        assert move["expert_placement/max_over_mean_before"] == max_over_mean(home, counts, 2).mean() == 1.8
        assert move["expert_placement/max_over_mean_after"] == 1.0
        # half of the experts change their rank, each with weights and two moments in float32
        bytes_of_expert = 3 * 4 * sum(tensor[0].numel() for name, tensor in plain[1].items() if "experts." in name)
        assert move["expert_placement/bytes"] == bytes_of_expert * E // 2


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"ep": 2}, {"ep": 4, "cp": 2}, {"ep": 2, "dp_replicate": 2}, {"ep": 2, "tp": 2}])
def test_four_processes(tmp_path, sizes):
    sources = ["off", reversed_file(tmp_path)]
    for plain, placed in run_processes(tmp_path, 4, train_each, sizes, sources, ""):
        assert_same(plain, placed)


def test_files_that_are_no_placement_are_refused(tmp_path):
    config = tiny_model().config
    path = Path(reversed_file(tmp_path))
    good = json.loads(path.read_text())
    layer = next(iter(good))
    assert read_placement(str(path), config)[0].tolist() == good[layer]
    for bad in ([], {}, {**good, "99": good[layer]}, {**good, layer: [0] * len(good[layer])}, {**good, layer: 3}):
        path.write_text(json.dumps(bad))
        with pytest.raises(ConfigError, match="placement.json"):
            read_placement(str(path), config)
    with pytest.raises(ConfigError, match="absent.json"):
        read_placement(str(tmp_path / "absent.json"), config)


def test_settings_without_effect_are_refused():
    with pytest.raises(ConfigError, match="parallel.ep 1"):
        ParallelConfig(expert_placement="forecast")
    with pytest.raises(ConfigError, match="expert_placement forecast"):
        ParallelConfig(ep=2, placement_every_steps=5)


def validated_and_trained(folder: Path) -> torch.Tensor:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "expert_placement/bytes" not in row]
    return torch.tensor([row.get("loss/main", row.get("validation/main")) for row in rows])


def cut_to_step_5(folder: Path, copy: Path) -> Path:
    """Copy a run as it was after step 5, with later records of its trace and metrics, as a killed run leaves them."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "checkpoints" / "step-00000010")
    return copy


@pytest.mark.slow
def test_a_run_with_forecasts_continues_exactly_and_on_one_process(tmp_path, recipe):  # noqa: F811
    placed = ("--expert-trace", "--parallel.ep", "2", "--parallel.expert-placement", "forecast")
    placed = (*placed, "--parallel.placement-every-steps", "2")
    succeed(tmp_path / "placed", 2, recipe, *placed)
    rows = read_metrics(tmp_path / "placed" / "metrics.jsonl")
    assert [row["step"] for row in rows if "expert_placement/bytes" in row] == [2, 4, 6, 8]
    assert sum(row.get("expert_placement/bytes", 0) for row in rows) > 0
    whole_run = validated_and_trained(tmp_path / "placed")
    same, alone = (cut_to_step_5(tmp_path / "placed", tmp_path / name) for name in ("same", "alone"))
    succeed(same, 2, recipe, *placed)
    succeed(alone, 1, recipe)
    assert torch.equal(validated_and_trained(same), whole_run)
    torch.testing.assert_close(validated_and_trained(alone), whole_run, rtol=2e-5, atol=2e-5)
    weights = [openmimo.load_model(folder / "model").state_dict() for folder in (tmp_path / "placed", same, alone)]
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name
        torch.testing.assert_close(weights[2][name], weight, rtol=1e-3, atol=1e-4, msg=name)


def succeed(folder: Path, processes: int, *arguments: str) -> None:
    finished = run(folder, processes, *arguments)
    assert finished.returncode == 0, finished.stderr
