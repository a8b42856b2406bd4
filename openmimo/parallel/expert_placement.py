"""Experts moved between the ranks of an expert-parallel run, between optimizer steps.

A placement states the expert of every slot of every sparse layer; rank r of R holds the r-th of R equal runs of slots.
A move sends the rows of weights and optimizer moments that change their rank in one all-to-all for each tensor. Routing
keeps global expert ids: only the dispatcher reads the slot of an expert. Checkpoints and exports are written in global
order, for which the experts move home and back, so that a run continues on any mesh.

A forecast depends on the trace up to a multiple of `every_steps` and on nothing else. A run that continues from a
checkpoint therefore has the placement of a run that was not interrupted.

Shapes: L layers, E experts (as many as slots; there are no replicas), n ranks.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from openmimo.core.errors import ConfigError
from openmimo.core.files import read_json
from openmimo.core.load_trace import read_load_trace
from openmimo.model.config import ModelConfig
from openmimo.model.mimo import MiMo
from openmimo.parallel.exchange import FetchPlan, fetch_rows, plan_fetch
from openmimo.parallel.expert import ParallelExperts
from openmimo.parallel.expert_load.placement import balanced, max_over_mean
from openmimo.parallel.expert_load.predictor import PREDICTORS
from openmimo.parallel.gradients import local_part
from openmimo.parallel.ranks import Ranks


def read_placement(path: str, config: ModelConfig) -> np.ndarray:
    """Read a placement, int64 [L, E]: an object from the index of each sparse layer to the experts of its slots.

    Raises:
        ConfigError: The file is missing or is no placement of the experts of a model.
    """
    layers, num_experts = _sparse_layers(config), config.moe.num_experts if config.moe else 0
    values = read_json(path)
    if not isinstance(values, dict) or set(values) != {str(layer) for layer in layers}:
        raise ConfigError(f"{path} must be a JSON object with the keys {', '.join(map(repr, map(str, layers)))}.")
    for layer, slots in values.items():
        are_ids = isinstance(slots, list) and all(type(slot) is int for slot in slots)
        if not are_ids or sorted(slots) != list(range(num_experts)):
            raise ConfigError(
                f"{path}: layer {layer} must be a list that has each expert from 0 to {num_experts - 1} exactly once."
            )
    return np.array([values[str(layer)] for layer in layers])


class ExpertPlacement:
    """The placement of the experts of one run. All processes call its methods together.

    Args:
        model: The model, distributed, with its experts in global order.
        optimizer: Its optimizer.
        ranks: The part of this process in the run.
        source: "forecast", or the path of a placement.
        every_steps: Steps between two forecasts.
        predictor: Name of the predictor.
        run_folder: The folder of the trace.

    Raises:
        ConfigError: The file of the placement does not fit the model.
    """

    def __init__(
        self,
        model: MiMo,
        optimizer: torch.optim.Optimizer,
        *,
        ranks: Ranks,
        source: str,
        every_steps: int,
        predictor: str,
        run_folder: Path,
    ):
        moe = model.config.moe
        assert moe is not None, "`distribute_experts` refuses a model without experts"
        self._ranks, self._optimizer, self._run_folder = ranks, optimizer, run_folder
        self._every_steps, self._predictor = every_steps, predictor
        self._layers = _sparse_layers(model.config)
        self._experts = _experts_by_layer(model)
        self._home_LE = np.tile(np.arange(moe.num_experts), (len(self._layers), 1))
        self._current_LE = self._home_LE
        self._file_LE: np.ndarray | None = None
        if source != "forecast":
            self._file_LE = ranks.on_main(lambda: read_placement(source, model.config))

    def begin(self, step: int) -> None:
        """Place the experts as they are after `step` in a run that was not interrupted."""
        last = step - step % self._every_steps
        if self._file_LE is not None:
            self._move(self._file_LE)
        elif last:
            self._move(self._forecast(last)[0])

    def after_step(self, step: int) -> dict[str, float]:
        """Move the experts if `step` ends a period of a forecast.

        Returns:
            Empty, or metrics of the move: forecast load of the busiest rank over the mean before and after, the mean
            over the layers; seconds; bytes that all processes have sent.
        """
        if self._file_LE is not None or step % self._every_steps:
            return {}
        placement_LE, shares_LE = self._forecast(step)
        before = self._max_over_mean(shares_LE).mean()
        started = time.perf_counter()
        sent = self._move(placement_LE)
        num_bytes = int(self._ranks.sum_over_all(torch.tensor(sent)))
        return {
            "expert_placement/max_over_mean_before": float(before),
            "expert_placement/max_over_mean_after": float(self._max_over_mean(shares_LE).mean()),
            "expert_placement/seconds": time.perf_counter() - started,
            "expert_placement/bytes": num_bytes,
        }

    def load_metrics(self, load: Mapping[int, torch.Tensor]) -> dict[str, float]:
        """Return the load of the busiest rank over the mean of the ranks by layer, for the load of a step."""
        loads_LE = np.stack([load[layer].cpu().numpy() for layer in self._layers])
        values = zip(self._layers, self._max_over_mean(loads_LE), strict=True)
        return {f"expert_placement/max_over_mean_{layer}": float(value) for layer, value in values}

    @contextmanager
    def global_order(self) -> Iterator[None]:
        """Hold the experts in global order during the block. If the block fails, the run ends, and they stay there."""
        placed_LE = self._current_LE
        self._move(self._home_LE)
        yield
        self._move(placed_LE)

    def end(self) -> None:
        """Bring the experts into global order."""
        self._move(self._home_LE)

    def _max_over_mean(self, loads_LE: np.ndarray) -> np.ndarray:
        return max_over_mean(self._current_LE, loads_LE, self._ranks.mesh.ep.size())

    def _forecast(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the placement for the steps after `step`, and the forecast shares that it is made from."""

        def on_main() -> tuple[np.ndarray, np.ndarray]:
            trace = read_load_trace(self._run_folder)
            shares = trace.shares[trace.steps <= step]
            if not len(shares):  # the run has recorded nothing before this step
                return self._home_LE, np.ones(self._home_LE.shape)
            forecast_HLE = PREDICTORS.get(self._predictor).predict(shares, self._every_steps)
            shares_LE = forecast_HLE.mean(axis=0)
            num_slots, num_devices = shares_LE.shape[1], self._ranks.mesh.ep.size()
            return balanced(shares_LE, num_slots=num_slots, num_devices=num_devices), shares_LE

        return self._ranks.on_main(on_main)

    @torch.no_grad()
    def _move(self, placement_LE: np.ndarray) -> int:
        """Apply a placement. Returns the bytes that this process has received."""
        num_bytes = 0
        for row, layer in enumerate(self._layers):
            if layer in self._experts and not np.array_equal(self._current_LE[row], placement_LE[row]):
                num_bytes += self._move_layer(self._experts[layer], self._current_LE[row], placement_LE[row])
        self._current_LE = placement_LE
        return num_bytes

    def _move_layer(self, experts: ParallelExperts, old_E: np.ndarray, new_E: np.ndarray) -> int:
        old_slots, new_slots = torch.from_numpy(np.argsort(old_E)), torch.from_numpy(np.argsort(new_E))
        needed = old_slots[torch.from_numpy(new_E)]  # for each new slot, the old slot of its expert
        num_ranks = dist.get_world_size(experts.group)
        held = torch.arange(len(needed))
        plan = plan_fetch(
            dist.get_rank(experts.group), list(held.chunk(num_ranks)), list(needed.chunk(num_ranks)), self._ranks.device
        )
        tensors = [tensor for weight in experts.parameters() for tensor in self._with_moments(weight)]
        experts.slot_of_expert_E = new_slots.to(self._ranks.device)
        return sum(_exchange_rows(local_part(tensor), plan, experts.group) for tensor in tensors)

    def _with_moments(self, weight: nn.Parameter) -> list[torch.Tensor]:
        state = self._optimizer.state.get(weight, {})
        return [weight, *(state[key] for key in sorted(state) if state[key].shape == weight.shape)]


def _exchange_rows(local: torch.Tensor, plan: FetchPlan, group: dist.ProcessGroup) -> int:
    """Replace the rows that this process holds of a tensor. Returns the bytes received."""
    local.copy_(fetch_rows(local, plan, group))
    return plan.num_received * local[0].numel() * local.element_size()


def _sparse_layers(config: ModelConfig) -> list[int]:
    return [index for index, layer in enumerate(config.layers) if layer.ffn == "moe"]


def _experts_by_layer(model: MiMo) -> dict[int, ParallelExperts]:
    """Return the experts of this process by layer; with pipeline stages, other processes have the other layers."""
    found = {}
    for index, layer in enumerate(model.model.layers):
        experts = [module for module in layer.modules() if isinstance(module, ParallelExperts)]
        if experts:
            found[index] = experts[0]
    return found
