"""Imbalance of devices under placements from forecasts, from one step, from no load, and from the load to come.

Each placement is made once, from the steps before the horizon, and kept for the whole horizon. The oracle is made from
the mean load of the horizon itself.
"""

from dataclasses import dataclass

import numpy as np

from openmimo.core.load_trace import LoadTrace
from openmimo.parallel.expert_load.forecast import Backtest
from openmimo.parallel.expert_load.placement import balanced, max_over_mean

STATIC, ORACLE = "static", "oracle"


@dataclass(frozen=True)
class Devices:
    """The devices that experts are placed on.

    Attributes:
        num_devices: Devices.
        num_slots: Slots of all devices; those above the number of experts hold replicas.
        num_groups: Groups of experts that stay on one node.
        num_nodes: Nodes.
    """

    num_devices: int
    num_slots: int
    num_groups: int = 1
    num_nodes: int = 1

    def place(self, loads_LE: np.ndarray) -> np.ndarray:
        """Return the balanced placement for a load, int64 [layers, slots]."""
        return balanced(
            loads_LE,
            num_slots=self.num_slots,
            num_devices=self.num_devices,
            num_groups=self.num_groups,
            num_nodes=self.num_nodes,
        )

    def static(self, num_layers: int, num_experts: int) -> np.ndarray:
        """Return the placement that knows no load: the balanced one of equal loads, int64 [layers, slots]."""
        return np.tile(self.place(np.ones((1, num_experts))), (num_layers, 1))


def compare_placements(trace: LoadTrace, tested: Backtest, devices: Devices, *, horizon: int) -> dict[str, np.ndarray]:
    """Return the max/mean load of the devices by source of the placement.

    Each value is float64 [layers]: the mean over the steps of all horizons of the ratio of a step.

    Args:
        trace: The trace.
        tested: Forecasts inside the trace.
        devices: The devices.
        horizon: Steps of each forecast.
    """
    shares, (_, num_layers, num_experts) = trace.shares, trace.counts.shape
    ratios: dict[str, list[np.ndarray]] = {}
    for place, origin in enumerate(tested.origins):
        after = shares[origin : origin + horizon]
        loads = {name: forecasts[place].mean(axis=0) for name, forecasts in tested.forecasts.items()}
        placements = {STATIC: devices.static(num_layers, num_experts)}
        placements |= {name: devices.place(load) for name, load in {**loads, ORACLE: after.mean(axis=0)}.items()}
        for name, placement in placements.items():
            ratios.setdefault(name, []).append(max_over_mean(placement, after, devices.num_devices).mean(axis=0))
    return {name: np.mean(values, axis=0) for name, values in ratios.items()}
