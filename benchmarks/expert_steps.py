"""Options of the optimizer step and of the routers' losses by expert, for the model of `expert_traces`.

    python -m benchmarks.expert_steps FOLDER [SEEDS] [STEPS]

Each arm is a pre-training run on the text of Python's standard library. Finished runs are read and not repeated.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from benchmarks.expert_traces import run_config
from openmimo.core.load_trace import read_load_trace
from openmimo.core.metrics import read_metrics
from openmimo.train.config import CheckpointConfig, ExpertStepConfig
from openmimo.train.pretrain import pretrain

# condition of `expert_traces`, and what is changed
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "no balance": ("none", {}),
    "no balance, idle experts kept": ("none", {"expert_step": ExpertStepConfig(keep_idle=True)}),
    "no balance, rate by share": ("none", {"expert_step": ExpertStepConfig(rate_exponent=0.5)}),
    "balance loss, sequence": ("loss", {}),
    "balance loss, batch": ("loss", {"balance_over": "batch"}),
    "bias": ("bias", {}),
    "bias, z-loss": ("bias", {"z_weight": 1e-3}),
    "bias, clip by expert": ("bias", {"expert_step": ExpertStepConfig(clip_norm=0.05)}),
    "bias, rate by share": ("bias", {"expert_step": ExpertStepConfig(rate_exponent=0.5)}),
    "bias, idle experts kept": ("bias", {"expert_step": ExpertStepConfig(keep_idle=True)}),
}
LAST = 200  # steps at the end over which load and movement are measured


def measure(folder: Path, arm: str, seed: int, steps: int) -> dict[str, float]:
    """Train an arm, and return its measures."""
    condition, changes = ARMS[arm]
    config = run_config(folder / arm.replace(", ", "-").replace(" ", "_"), condition, steps=steps, seed=seed)
    config = replace(config, checkpoints=CheckpointConfig(every_steps=LAST, keep_last=2), **changes)
    pretrain(config)
    run = Path(config.run_folder)
    losses = [row["validation/main"] for row in read_metrics(run / "metrics.jsonl") if "validation/main" in row]
    counts = read_load_trace(run).counts[-LAST:].astype(np.float64)  # [steps, layers, experts]
    share = counts.sum(axis=0) / counts.sum(axis=0).mean(axis=-1, keepdims=True)
    moved = movement(run, steps)
    rare = np.argsort(share, axis=-1)[:, : share.shape[1] // 4]
    return {
        "held-out loss": losses[-1],
        "max/mean load": float((counts.max(-1) / counts.mean(-1)).mean()),
        "idle %": 100 * float((counts == 0).mean()),
        "rare experts' movement": float((np.take_along_axis(moved, rare, -1).mean(-1) / moved.mean(-1)).mean()),
    }


def movement(run: Path, steps: int) -> np.ndarray:
    """Return the norm of the change of each expert's weights in the last steps, [layers, experts]."""
    first, last = (
        load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for step in (steps - LAST, steps)
    )
    squares: dict[tuple[int, int], float] = {}
    for name, tensor in last.items():
        if ".experts." in name:
            parts = name.split(".")  # model.layers.1.mlp.experts.7.up_proj.weight
            key = int(parts[2]), int(parts[5])
            squares[key] = squares.get(key, 0.0) + float((tensor.float() - first[name].float()).square().sum())
    layers, experts = (sorted({key[axis] for key in squares}) for axis in (0, 1))
    return np.array([[math.sqrt(squares[layer, expert]) for expert in experts] for layer in layers])


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return the means and 95 % intervals (t) over seeds as a Markdown table."""
    names = list(next(iter(results.values()))[0])
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for arm, rows in results.items():
        cells = []
        for name in names:
            values = np.array([row[name] for row in rows])
            t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 1.96)
            half = t * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
            cells.append(f"{values.mean():.3f} ± {half:.3f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all arms, seed by seed, and print the table."""
    folder, seeds, steps = Path(sys.argv[1]), int((sys.argv[2:3] or "3")[0]), int((sys.argv[3:4] or "1000")[0])
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            results[arm].append(measure(folder, arm, seed, steps))
            (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
