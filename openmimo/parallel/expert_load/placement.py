"""Placement of experts and their replicas on devices, from a load per expert.

`balanced` is DeepSeek's EPLB, written from its published definition: groups of experts are packed on nodes, each node
gives its spare slots to the experts with the largest load per replica, and packs the replicas on its devices. If the
groups cannot be divided between the nodes, the nodes count as one. `optimal` finds the smallest maximum for a few
experts, to compare with.

A placement of a layer is the list of the experts of its slots; slots belong to devices in equal runs. All replicas of
an expert take equal parts of its load.

Shapes: L layers, E experts, R slots, D devices.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from openmimo.core.errors import ConfigError


def check_slots(num_experts: int, num_slots: int, num_devices: int) -> None:
    """Raise ConfigError if the slots do not hold every expert, or devices would differ in slots."""
    if num_devices < 1 or num_slots < num_experts or num_slots % num_devices:
        raise ConfigError(
            f"{num_slots} slots cannot hold {num_experts} experts in equal parts on {num_devices} devices; the number "
            f"of slots must be a multiple of {num_devices}, and at least {num_experts}."
        )


def _packed(loads_N: np.ndarray, num_bins: int) -> np.ndarray:
    """Return items in the order of the bins, int64 [N]: the heaviest first, each to the lightest bin with room."""
    room = len(loads_N) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = np.zeros(num_bins)
    for item in np.argsort(-loads_N, kind="stable").tolist() if room > 1 else range(len(loads_N)):
        lightest = min((b for b in range(num_bins) if len(bins[b]) < room), key=lambda b: (totals[b], b))
        # with room for one item a bin, the items stay in order
        chosen = lightest if room > 1 else item
        bins[chosen].append(item)
        totals[chosen] += loads_N[item]
    return np.array([item for contents in bins for item in contents])


def _replicated(loads_N: np.ndarray, num_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the item of each slot, int64 [slots], and the number of slots of each item."""
    counts_N = np.ones(len(loads_N), dtype=np.int64)
    items = list(range(len(loads_N)))
    for _ in range(num_slots - len(loads_N)):
        busiest = int(np.argmax(loads_N / counts_N))
        counts_N[busiest] += 1
        items.append(busiest)
    return np.array(items), counts_N


def balanced(
    loads_LE: np.ndarray, *, num_slots: int, num_devices: int, num_groups: int = 1, num_nodes: int = 1
) -> np.ndarray:
    """Return the expert of each slot by EPLB, int64 [L, R].

    Args:
        loads_LE: Load of each expert, at least 0.
        num_slots: Slots of all devices.
        num_devices: Devices of all nodes.
        num_groups: Groups of neighboring experts that stay on one node, for group-limited routing.
        num_nodes: Nodes. With a number that does not divide the groups, all devices count as one node.

    Raises:
        ConfigError: The numbers cannot be divided into equal parts.
    """
    num_experts = loads_LE.shape[1]
    if num_groups < 1 or num_nodes < 1 or num_groups % num_nodes:
        num_groups = num_nodes = 1
    check_slots(num_experts, num_slots, num_devices)
    if num_devices % num_nodes or num_experts % num_groups:
        raise ConfigError(
            f"{num_devices} devices and {num_experts} experts cannot be divided into {num_nodes} nodes and "
            f"{num_groups} groups of equal size."
        )
    return np.stack([_one_layer(loads_E, num_slots, num_devices, num_groups, num_nodes) for loads_E in loads_LE])


def _one_layer(loads_E: np.ndarray, num_slots: int, num_devices: int, num_groups: int, num_nodes: int) -> np.ndarray:
    group_size = len(loads_E) // num_groups
    groups = _packed(loads_E.reshape(num_groups, group_size).sum(axis=1), num_nodes)
    experts_of_node = (groups[:, None] * group_size + np.arange(group_size)).reshape(num_nodes, -1)
    slots = []
    for experts in experts_of_node:
        items, counts = _replicated(loads_E[experts], num_slots // num_nodes)
        order = _packed((loads_E[experts] / counts)[items], num_devices // num_nodes)
        slots.append(experts[items[order]])
    return np.concatenate(slots)


def device_loads(expert_of_slot_LR: np.ndarray, loads_LE: np.ndarray, num_devices: int) -> np.ndarray:
    """Return the load of each device, float64 [..., L, D], for loads [..., L, E]."""
    num_layers, num_slots = expert_of_slot_LR.shape
    parts_LE = np.zeros((num_layers, loads_LE.shape[-1]))
    np.add.at(parts_LE, (np.arange(num_layers)[:, None], expert_of_slot_LR), 1.0)
    rows = np.arange(num_layers)[:, None]
    per_slot = loads_LE[..., rows, expert_of_slot_LR] / parts_LE[rows, expert_of_slot_LR]
    return per_slot.reshape(*loads_LE.shape[:-1], num_devices, num_slots // num_devices).sum(axis=-1)


def max_over_mean(expert_of_slot_LR: np.ndarray, loads_LE: np.ndarray, num_devices: int) -> np.ndarray:
    """Return the load of the busiest device over the mean of the devices, float64 [..., L]. 1 is perfect balance."""
    loads_LD = device_loads(expert_of_slot_LR, loads_LE, num_devices)
    mean_L = loads_LD.mean(axis=-1)
    return np.divide(loads_LD.max(axis=-1), mean_L, out=np.ones_like(mean_L), where=mean_L > 0)


_MOST_SLOTS = 12


def optimal(loads_E: np.ndarray, *, num_slots: int, num_devices: int) -> np.ndarray:
    """Return the placement of one layer with the smallest maximum load, int64 [R], by branch and bound.

    Raises:
        ConfigError: There are more than 12 slots, or they cannot be divided into equal parts.
    """
    check_slots(len(loads_E), num_slots, num_devices)
    if num_slots > _MOST_SLOTS:
        raise ConfigError(f"the optimal placement is searched for at most {_MOST_SLOTS} slots, not {num_slots}.")
    best_load, best = float("inf"), None
    for counts_E in _replica_counts(len(loads_E), num_slots):
        sizes_E = loads_E / counts_E
        if max(sizes_E.max(), loads_E.sum() / num_devices) >= best_load:
            continue
        experts = np.repeat(np.arange(len(loads_E)), counts_E)
        experts = experts[np.argsort(-sizes_E[experts], kind="stable")]
        load, devices = _best_packing(sizes_E[experts], num_devices, best_load)
        if devices is not None:
            best_load, best = load, experts[np.argsort(devices, kind="stable")]
    assert best is not None
    return best


def _replica_counts(num_experts: int, num_slots: int) -> Iterator[np.ndarray]:
    """Yield every way to give each expert at least one of the slots, int64 [E]."""
    spare = num_slots - num_experts
    for bars in itertools.combinations(range(spare + num_experts - 1), num_experts - 1):
        edges = np.array([-1, *bars, spare + num_experts - 1])
        yield np.diff(edges)


def _best_packing(sizes_R: np.ndarray, num_devices: int, bound: float) -> tuple[float, np.ndarray | None]:
    """Return the smallest maximum below `bound`, and the device of each item (None: there is no packing below it).

    Items come in falling order of size. Devices with the same load and room are tried once.
    """
    room = len(sizes_R) // num_devices
    loads, counts = [0.0] * num_devices, [0] * num_devices
    chosen, best = [0] * len(sizes_R), None

    def place(item: int) -> None:
        nonlocal bound, best
        if item == len(sizes_R):
            bound, best = max(loads), np.array(chosen)
            return
        tried = set()
        for device in range(num_devices):
            state = (loads[device], counts[device])
            if counts[device] == room or state in tried or loads[device] + sizes_R[item] >= bound:
                continue
            tried.add(state)
            before = loads[device]
            loads[device], counts[device], chosen[item] = before + sizes_R[item], counts[device] + 1, device
            place(item + 1)
            loads[device], counts[device] = before, counts[device] - 1

    place(0)
    return bound, best
