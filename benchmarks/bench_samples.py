"""Host costs of a long sample: bookkeeping of the engine, event log, and packing for the trainer.

    python -m benchmarks.bench_samples [--old FOLDER] [--tokens 32768] [--rounds 5] [--no-write]

The sample has 32,768 tokens of a model with 47 sparse layers and 8 experts per token, as in MiMo-V2-Flash. No model
runs. The stages are:

- engine: a request confirms its tokens one at a time, stores their routes, and adds its blocks to the prefix tree;
- sample: the completion is converted to a sample;
- log: the event log writes the sample, flushes it to disk (`sync`) and reads it back with checksums (`read`);
- pack: the sample and its routes are converted to tensors for the trainer.

Bytes of the log exclude routes, which are stored once with one byte per expert (layers x experts per token). Bytes of
the engine are those of a request and its part of the prefix tree, without routes.

FOLDER is a checkout of an earlier version, which is measured alternately with this one. Each measurement runs in its
own process (`sample_costs.py`). Rows show medians for a whole sample: CPU time, and wall time for `sync`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.harness import Row, print_rows, write_rows

LAYERS = 47
STAGES = ("engine", "sample", "log", "sync", "read", "pack")
GOAL_MICROSECONDS, GOAL_BYTES = 1.0, 100


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="a checkout of an earlier version to compare with")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true", help="write no results")
    return parser.parse_args(arguments)


def measure(folder: Path, tokens: int) -> dict[str, float]:
    """Measures the package in `folder` once, in a separate process."""
    script = Path(__file__).with_name("sample_costs.py")
    run = subprocess.run(
        [sys.executable, str(script), str(tokens), str(LAYERS)],
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(run.stdout)


def medians(folders: list[Path], tokens: int, rounds: int) -> list[dict[str, float]]:
    """Measures the folders alternately and returns the median costs of each."""
    found: list[list[dict[str, float]]] = [[] for _ in folders]
    for _ in range(rounds):
        for costs, folder in zip(found, folders, strict=True):
            costs.append(measure(folder, tokens))
    return [{name: statistics.median(one[name] for one in costs) for name in costs[0]} for costs in found]


def rows_of(tokens: int, ours: dict[str, float], old: dict[str, float] | None) -> list[Row]:
    """Returns a row for each stage and one for all stages after the engine."""
    stages = {name: (name,) for name in STAGES} | {"sample to pack": STAGES[1:]}
    rows = []
    for name, parts in stages.items():
        seconds = sum(ours[f"{part}_seconds"] for part in parts)
        peer = None if old is None else 1e3 * sum(old[f"{part}_seconds"] for part in parts)
        note = f"{1e6 * seconds / tokens:.2f} us per token"
        rows.append(Row(name, 1e3 * seconds, peer, "before" if old else "", note=note))
    return rows


def remarks_of(tokens: int, ours: dict[str, float], old: dict[str, float] | None) -> tuple[str, ...]:
    """Returns sentences on the bytes per token of this version and the earlier one."""

    def bytes_of(costs: dict[str, float]) -> str:
        log = (costs["log_bytes"] - costs["routes_bytes"]) / tokens
        return f"engine {costs['engine_bytes'] / tokens:.0f}, log {log:.1f}"

    before = f"; before: {bytes_of(old)}" if old else ""
    return (
        f"Bytes per token without routes: {bytes_of(ours)}{before}. Routes: {LAYERS * 8} bytes per token, stored once.",
        f"Goal: at most {GOAL_MICROSECONDS:g} us and {GOAL_BYTES} bytes per token.",
    )


def main(options: argparse.Namespace) -> None:
    """Measures, prints and writes the results."""
    here = Path(__file__).resolve().parent.parent
    ours, *old = medians([here, *([options.old] if options.old else [])], options.tokens, options.rounds)
    rows = rows_of(options.tokens, ours, old[0] if old else None)
    remarks = remarks_of(options.tokens, ours, old[0] if old else None)
    print_rows(rows)
    print(*remarks, sep="\n")
    if not options.no_write:
        write_rows("samples", rows, device=torch.device("cpu"), threads=1, remarks=remarks)


if __name__ == "__main__":
    main(parse())
