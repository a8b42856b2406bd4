"""The page of `openmimo experts`: the load map, the state of each layer, forecasts, and the proposed placement."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openmimo.core.load_trace import LoadTrace, read_load_trace
from openmimo.parallel.expert_load.comparison import ORACLE, STATIC, Devices, compare_placements
from openmimo.parallel.expert_load.config import DetectorConfig, ExpertsConfig
from openmimo.parallel.expert_load.forecast import Backtest, backtest
from openmimo.parallel.expert_load.placement import device_loads, max_over_mean
from openmimo.parallel.expert_load.predictor import PREDICTORS
from openmimo.parallel.expert_load.state import LoadState, detect_state
from openmimo.runtime.report import Report, new_figure

PAGE_FILE = "experts.html"
_MOST_COLUMNS = 200  # of a load map
_MOST_MAPS = 12  # layers with a map and a forecast of their own
_MOST_LINES = 4  # experts of a forecast


def devices_for(config: ExpertsConfig, num_experts: int) -> Devices:
    """Return the devices for a number of experts: the fewest slots per device that hold all, and the spare ones."""
    per_device = -(-num_experts // config.devices) + config.spare_slots
    return Devices(config.devices, per_device * config.devices, config.groups, config.nodes)


@dataclass(frozen=True)
class Findings:
    """What was computed from a trace.

    Attributes:
        state: The state of each layer.
        tested: Forecasts inside the trace and their errors.
        ratios: Max/mean load of the devices by source of the placement, [layers].
        forecast: The forecast of the steps after the trace, [horizon or 1, layers, experts].
        proposal: The expert of each slot for those steps, [layers, slots].
        devices: The devices.
        horizon: Steps of the forecasts.
    """

    state: LoadState
    tested: Backtest
    ratios: dict[str, np.ndarray]
    forecast: np.ndarray
    proposal: np.ndarray
    devices: Devices
    horizon: int


def analyze(trace: LoadTrace, config: ExpertsConfig) -> Findings:
    """Compute everything that the page shows. Raises ConfigError."""
    horizon = config.horizon or max(min(len(trace.steps) // 3, 1000), 1)
    devices = devices_for(config, trace.header.num_experts)
    devices.static(1, trace.header.num_experts)  # refuses numbers that do not fit before the forecasts are made
    tested = backtest(trace, list(config.predictors), horizon=horizon, num_origins=config.num_origins)
    forecast = PREDICTORS.get(config.predictors[0]).predict(trace.shares, horizon)
    return Findings(
        state=detect_state(trace, config.detector),
        tested=tested,
        ratios=compare_placements(trace, tested, devices, horizon=horizon),
        forecast=forecast,
        proposal=devices.place(forecast.mean(axis=0)),
        devices=devices,
        horizon=horizon,
    )


def write_page(run_folder: Path, config: ExpertsConfig) -> Path:
    """Read the trace of a run, and write `experts.html` in its folder. Returns the path. Raises ConfigError."""
    trace = read_load_trace(run_folder)
    findings = analyze(trace, config)
    report = Report(f"Expert load of {run_folder.resolve().name}")
    header = trace.header
    report.paragraph(
        f"Steps {trace.steps[0]} to {trace.steps[-1]} of {len(header.layers)} sparse layers with {header.num_experts} "
        f"experts, {header.experts_per_token} per token; {int(trace.slots[-1].mean())} routed slots a step and layer."
    )
    report.heading("Load over time")
    report.figure(
        _maps(trace), "Share of the slots of each expert (rows) over the steps, times the number of experts: 1 is even."
    )
    report.heading("State")
    _state_section(report, trace, findings.state, config.detector)
    report.heading(f"Forecast of {findings.horizon} steps")
    _forecast_section(report, trace, findings)
    report.heading("Placement")
    _placement_section(report, trace, findings)
    return report.write(run_folder / PAGE_FILE)


def _grid(count: int) -> tuple[Any, list[Any]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, axes = new_figure(width=9.0, height=2.6 * rows, columns=columns, rows=rows)
    flat = list(np.ravel(axes))
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]


def _maps(trace: LoadTrace) -> Any:
    layers = trace.header.layers[:_MOST_MAPS]
    figure, axes = _grid(len(layers))
    parts = np.array_split(np.arange(len(trace.steps)), min(len(trace.steps), _MOST_COLUMNS))
    columns = np.stack([trace.shares[part].mean(axis=0) for part in parts]) * trace.header.num_experts
    for place, (axis, layer) in enumerate(zip(axes, layers, strict=True)):
        image = axis.imshow(
            columns[:, place].T,
            aspect="auto",
            interpolation="nearest",
            vmin=0.0,
            vmax=max(2.0, float(np.quantile(columns, 0.99))),
            extent=(trace.steps[0], trace.steps[-1] + 1, trace.header.num_experts - 0.5, -0.5),
        )
        axis.grid(False)
        axis.set_title(f"layer {layer}", fontsize=9)
        axis.set_xlabel("step")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _state_section(report: Report, trace: LoadTrace, state: LoadState, config: DetectorConfig) -> None:
    if not len(state.ends):
        report.paragraph(f"The trace is shorter than a window of {config.window_steps} steps.")
        return
    figure, (left, right) = new_figure(width=9.0, height=2.8, columns=2)
    steps = trace.steps[state.ends - 1]
    for place, layer in enumerate(trace.header.layers[:_MOST_MAPS]):
        left.plot(steps, np.maximum(state.dispersion[:, place], 0.1), label=f"layer {layer}")
        right.plot(steps[config.span_windows :], np.maximum(state.shift[config.span_windows :, place], 0.1))
    for axis, name, limit in ((left, "dispersion", config.max_dispersion), (right, "shift", config.max_shift)):
        axis.axhline(limit, color="black", linestyle=":")
        axis.set(yscale="log", xlabel="step", title=name)
    left.legend(fontsize=7)
    report.figure(
        figure,
        f"Variance within windows of {config.window_steps} steps over that of sampling, and squared change over "
        f"{config.span_windows} windows over its variance. Dotted: the limits of the stable state.",
    )
    rows = []
    for place, layer in enumerate(trace.header.layers):
        first = state.stable_from(place)
        known = "transient" if first is None else f"stable from step {trace.steps[first - 1]}"
        rows.append([layer, known, float(state.dispersion[-1, place]), float(state.shift[-1, place])])
    report.table(["layer", "state at the end", "last dispersion", "last shift"], rows)


def _forecast_section(report: Report, trace: LoadTrace, findings: Findings) -> None:
    rows = []
    for name, errors in findings.tested.errors.items():
        step, step_floor, mean, mean_floor = (
            100 * float(np.mean([getattr(error, field) for error in errors]))
            for field in ("step_L", "step_floor_L", "horizon_L", "horizon_floor_L")
        )
        rows.append([name, step, step_floor, mean, mean_floor])
    report.table(["predictor", "error of a step, %", "sampling floor, %", "error of the mean, %", "its floor, %"], rows)
    report.paragraph(
        f"Mean over the layers and {len(findings.tested.origins)} horizons inside the trace. Errors are absolute, "
        "summed over the experts, as a share of all slots. The floors are the errors of a forecast that knows the "
        "shares, if tokens chose independently."
    )
    report.figure(
        _forecasts(trace, findings),
        f"Shares (means of {_smoothing(trace)} steps) of the most loaded experts, and the forecast by "
        f"{next(iter(findings.tested.forecasts))}. Band: the 90th percentile of its errors on horizons inside the "
        "trace.",
    )


def _smoothing(trace: LoadTrace) -> int:
    return max(len(trace.steps) // 150, 1)


def error_band(trace: LoadTrace, tested: Backtest, horizon: int) -> np.ndarray:
    """Return the 90th percentile of the errors of a smoothed step by the first predictor, [layers]."""
    name, width = next(iter(tested.forecasts)), _smoothing(trace)
    errors = []
    for origin, forecast_HLE in zip(tested.origins, tested.forecasts[name], strict=True):
        whole = horizon // width * width
        error_HLE = (trace.shares[origin : origin + horizon] - forecast_HLE)[:whole]
        errors.append(np.abs(error_HLE.reshape(-1, width, *error_HLE.shape[1:]).mean(axis=1)))
    return np.quantile(np.concatenate(errors), 0.9, axis=(0, 2))


def _forecasts(trace: LoadTrace, findings: Findings) -> Any:
    layers, width = trace.header.layers[:_MOST_MAPS], _smoothing(trace)
    figure, axes = _grid(len(layers))
    whole = len(trace.steps) // width * width
    past_SLE = trace.shares[-whole:].reshape(-1, width, *trace.counts.shape[1:]).mean(axis=1)
    steps = trace.steps[-whole:].reshape(-1, width)[:, -1]
    ahead = trace.steps[-1] + np.arange(1, findings.horizon + 1)
    forecast_HLE = np.broadcast_to(findings.forecast, (findings.horizon, *trace.counts.shape[1:]))
    band_L = error_band(trace, findings.tested, findings.horizon)
    for place, (axis, layer) in enumerate(zip(axes, layers, strict=True)):
        for number, expert in enumerate(np.argsort(-forecast_HLE[0, place], kind="stable")[:_MOST_LINES]):
            color = f"C{number}"
            axis.plot(steps, past_SLE[:, place, expert], color=color, linewidth=0.8, label=f"expert {expert}")
            line = forecast_HLE[:, place, expert]
            axis.plot(ahead, line, color=color, linestyle="--")
            axis.fill_between(
                ahead, np.maximum(line - band_L[place], 0), line + band_L[place], color=color, alpha=0.2, linewidth=0
            )
        axis.axvline(trace.steps[-1], color="black", linewidth=0.8)
        axis.set_title(f"layer {layer}", fontsize=9)
        axis.set_xlabel("step")
        axis.legend(fontsize=6)
    return figure


def _placement_section(report: Report, trace: LoadTrace, findings: Findings) -> None:
    devices = findings.devices
    report.paragraph(
        f"{devices.num_slots} slots on {devices.num_devices} devices. Below: the load of the busiest device over the "
        f"mean of the devices, the mean over the steps of {len(findings.tested.origins)} horizons, for placements made "
        "before each horizon from no load (static), from each forecast, and from the load of the horizon itself "
        "(oracle)."
    )
    names = [STATIC, *findings.tested.forecasts, ORACLE]
    rows: list[list[Any]] = [
        [layer, *(float(findings.ratios[name][place]) for name in names)]
        for place, layer in enumerate(trace.header.layers)
    ]
    rows.append(["mean", *(float(findings.ratios[name].mean()) for name in names)])
    report.table(["layer", *names], rows)
    loads_LE = findings.forecast.mean(axis=0)
    static = devices.static(*loads_LE.shape)
    figure, axes = _grid(min(len(trace.header.layers), _MOST_MAPS))
    for place, axis in enumerate(axes):
        for offset, label, placement in ((-0.2, "static", static), (0.2, "proposed", findings.proposal)):
            loads_D = device_loads(placement, loads_LE, devices.num_devices)[place] * devices.num_devices
            axis.bar(np.arange(devices.num_devices) + offset, loads_D, width=0.4, label=label)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(xlabel="device", xticks=range(devices.num_devices))
        axis.set_title(f"layer {trace.header.layers[place]}", fontsize=9)
        axis.legend(fontsize=6)
    report.figure(figure, "Forecast load of each device over the mean, by the static and the proposed placement.")
    ratio_L = max_over_mean(findings.proposal, loads_LE, devices.num_devices)
    shown = [
        [
            layer,
            float(ratio_L[place]),
            *(" ".join(map(str, sorted(part))) for part in np.split(row, devices.num_devices)),
        ]
        for place, (layer, row) in enumerate(zip(trace.header.layers, findings.proposal, strict=True))
    ]
    report.paragraph("The proposed placement for the steps after the trace: experts of each device.")
    report.table(["layer", "max/mean", *(f"device {number}" for number in range(devices.num_devices))], shown)
