"""Forecasts, detector lag and placements on drawn traces and on traces of runs (docs/experts.md).

    python -m benchmarks.bench_expert_load placements          # the greedy placement against the search
    python -m benchmarks.bench_expert_load lags                # the detector on drifts of known length
    python -m benchmarks.bench_expert_load drawn [PREDICTOR ...]
    python -m benchmarks.bench_expert_load runs HORIZON RUN_FOLDER [...] -- [PREDICTOR ...]

Prints Markdown tables.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.synthetic_load import drawn_trace, drift, random_shares
from openmimo.core.load_trace import LoadTrace, read_load_trace
from openmimo.parallel.expert_load.comparison import ORACLE, STATIC, Devices, compare_placements
from openmimo.parallel.expert_load.config import DetectorConfig
from openmimo.parallel.expert_load.forecast import backtest
from openmimo.parallel.expert_load.placement import balanced, max_over_mean, optimal
from openmimo.parallel.expert_load.state import detect_state

PREDICTORS = ["last_value", "window_average", "exponential_average", "lstm"]
SEEDS = range(3)
PAST, HORIZON, TOKENS = 2000, 1000, 2048


def walk(num_experts: int, seed: int) -> np.ndarray:
    """Shares whose logits take a random step of 0.01 in each training step."""
    rng = np.random.default_rng(seed)
    logits = 0.5 * rng.standard_normal(num_experts)
    logits = logits + np.cumsum(0.01 * rng.standard_normal((PAST + HORIZON, num_experts)), axis=0)
    shares = np.exp(logits)
    return (shares / shares.sum(axis=-1, keepdims=True))[:, None]


def line(num_experts: int, seed: int) -> np.ndarray:
    """Shares that move in a line over the whole trace."""
    first, last = (random_shares(num_experts, spread=0.5, seed=2 * seed + place) for place in (0, 1))
    return drift(first, last, before=0, during=PAST + HORIZON, after=0)


def steady(num_experts: int, seed: int) -> np.ndarray:
    """Unequal shares that do not change."""
    return np.tile(random_shares(num_experts, spread=0.5, seed=seed), (PAST + HORIZON, 1, 1))


def even(num_experts: int, seed: int) -> np.ndarray:
    """Equal shares, the aim of bias balancing."""
    return np.full((PAST + HORIZON, 1, num_experts), 1.0 / num_experts)


KINDS: dict[str, Callable[[int, int], np.ndarray]] = {"steady": steady, "walk": walk, "line": line, "even": even}


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table whose first column is text."""
    print("| " + " | ".join(header) + " |")
    print("| --- |" + " ---: |" * (len(header) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def measure(traces: list[LoadTrace], devices: Devices, *, horizon: int, predictors: list[str]) -> list[list[str]]:
    """Return a row for each source of a placement: errors over floors, and max/mean load; means over the traces."""
    errors: dict[str, list[list[float]]] = {}
    ratios: dict[str, list[float]] = {}
    for trace in traces:
        tested = backtest(trace, predictors, horizon=horizon, num_origins=1)
        for name, (error,) in tested.errors.items():
            fields = (error.step_L, error.step_floor_L, error.horizon_L, error.horizon_floor_L)
            errors.setdefault(name, []).append([100 * float(values.mean()) for values in fields])
        for name, ratio_L in compare_placements(trace, tested, devices, horizon=horizon).items():
            ratios.setdefault(name, []).append(float(ratio_L.mean()))
    rows = []
    for name in [STATIC, *predictors, ORACLE]:
        means = [f"{value:.2f}" for value in np.mean(errors[name], axis=0)] if name in errors else [""] * 4
        rows.append([name, *means, f"{np.mean(ratios[name]):.3f}"])
    return rows


HEADER = ["placement from", "step error, %", "floor, %", "error of the mean, %", "floor, %", "max/mean load"]


def drawn(predictors: list[str]) -> None:
    """Print the tables of the drawn traces."""
    for num_experts, devices in ((16, Devices(4, 20)), (128, Devices(8, 144))):
        for kind, shares in KINDS.items():
            traces = [drawn_trace(shares(num_experts, seed), tokens=TOKENS, seed=seed) for seed in SEEDS]
            print(f"{num_experts} experts, {kind}: {HORIZON} steps ahead, {len(SEEDS)} seeds\n")
            print_table(HEADER, measure(traces, devices, horizon=HORIZON, predictors=predictors))


def runs(horizon: int, folders: list[str], predictors: list[str]) -> None:
    """Print the table of each run, and the state of its layers."""
    for folder in folders:
        trace = read_load_trace(Path(folder))
        num_experts = trace.header.num_experts
        state = detect_state(trace, DetectorConfig())
        print(f"{Path(folder).name}: {len(trace.steps)} steps, {horizon} ahead\n")
        for place, layer in enumerate(trace.header.layers):
            last = trace.shares[-horizon:, place].mean(axis=0) * num_experts
            print(
                f"layer {layer}: stable from {state.stable_from(place)}, dispersion of the last 5 windows "
                f"{np.median(state.dispersion[-5:, place]):.2f}, shift {np.median(state.shift[-5:, place]):.2f}, load "
                f"of an expert over the mean {last.min():.2f} to {last.max():.2f}\n"
            )
        for spare in (0, 1):
            devices = Devices(4, num_experts + 4 * spare)
            print(f"4 devices, {devices.num_slots} slots\n")
            print_table(HEADER, measure([trace], devices, horizon=horizon, predictors=predictors))


def lags() -> None:
    """Print how long after the start and the end of a drift the detector changes its state."""
    rows = []
    for length in (1, 200, 1000):
        for tokens in (512, 2048):
            starts, ends, missed = [], [], 0
            for seed in range(20):
                first, last = (random_shares(16, spread=0.5, seed=2 * seed + place) for place in (0, 1))
                shares = drift(first, last, before=1000, during=length, after=1500)
                state = detect_state(drawn_trace(shares, tokens=tokens, seed=seed), DetectorConfig())
                unstable = state.ends[(~state.is_stable[:, 0]) & (state.ends > 1000)]
                missed += not len(unstable)
                if len(unstable):
                    starts.append(int(unstable[0]) - 1000)
                    ends.append((state.stable_from(0) or len(shares)) - 1000 - length)
            rows.append(
                [f"{length} steps, {tokens} tokens", f"{20 - missed} of 20", f"{np.median(starts):.0f}"]
                + [f"{np.median(ends):.0f} ({min(ends)} to {max(ends)})"]
            )
    print_table(["drift", "seen", "transient after, steps", "stable again after, steps"], rows)


def placements() -> None:
    """Print the maximum of the greedy placement over the smallest possible one."""
    rows = []
    for experts, slots, devices in ((8, 8, 4), (6, 8, 4), (8, 10, 5), (8, 12, 4)):
        rng, excess, best = np.random.default_rng(0), [], []
        for _ in range(30):
            loads = np.exp(rng.standard_normal((1, experts)))
            found = optimal(loads[0], num_slots=slots, num_devices=devices)[None]
            greedy = balanced(loads, num_slots=slots, num_devices=devices)
            best.append(float(max_over_mean(found, loads, devices)[0]))
            excess.append(float(max_over_mean(greedy, loads, devices)[0]) / best[-1])
        rows.append(
            [f"{experts} experts, {slots} slots, {devices} devices", f"{np.mean(best):.3f}"]
            + [f"{np.mean(excess):.3f}", f"{max(excess):.3f}", f"{np.mean(np.array(excess) < 1 + 1e-9):.0%}"]
        )
    print_table(["case", "optimal max/mean", "greedy over it, mean", "largest", "equal"], rows)


if __name__ == "__main__":
    what, rest = sys.argv[1], sys.argv[2:]
    if what == "drawn":
        drawn(rest or PREDICTORS)
    elif what == "runs":
        cut = rest.index("--") if "--" in rest else len(rest)
        runs(int(rest[0]), rest[1:cut], rest[cut + 1 :] or PREDICTORS)
    else:
        {"lags": lags, "placements": placements}[what]()
