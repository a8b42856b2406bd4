"""What the benchmarks share: interleaved timing, rows, and results as JSON with machine, versions and commit."""

import os

# Before torch is imported: threads that spin while waiting time each other out on shared cores (both sides alike).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from datetime import date  # noqa: E402
from importlib.metadata import PackageNotFoundError, version  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from openmimo.runtime.device import device_name, synchronize  # noqa: E402

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One measurement: ours and the peer's median milliseconds of the same run, and their ratio (above 1: we are
    faster).

    floor_ms: what the arithmetic alone takes at the measured rate of a large matrix product (None: not counted). goal:
    the least ratio that this project set itself (None: none).
    """

    name: str
    ours_ms: float
    peer_ms: float | None = None
    peer: str = ""
    floor_ms: float | None = None
    goal: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Peer time over ours."""
        return None if self.peer_ms is None else self.peer_ms / self.ours_ms


def median_milliseconds(
    calls: list[Callable[[], object]], *, rounds: int, device: torch.device | None = None
) -> list[float]:
    """Median wall time of each call after one warm-up; all calls once a round, so that other load meets them alike."""
    device = device or torch.device("cpu")
    for call in calls:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, call in zip(seconds, calls, strict=True):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times.append(time.perf_counter() - start)
    return [1e3 * statistics.median(times) for times in seconds]


def print_rows(rows: list[Row]) -> None:
    """A table on the terminal."""
    table = Table("what", "ours ms", "peer ms", "ratio", "goal", "floor ms", "peer", "note")
    for row in rows:
        table.add_row(
            row.name, f"{row.ours_ms:.2f}", _shown(row.peer_ms), _shown(row.ratio, "x"), _shown(row.goal, "x"),
            _shown(row.floor_ms), row.peer, row.note,
        )  # fmt: skip
    Console().print(table)


def write_rows(
    benchmark: str, rows: list[Row], *, device: torch.device, threads: int, remarks: tuple[str, ...] = ()
) -> Path:
    """Writes `results/<machine>/<date>_<benchmark>.json`, then RESULTS.md anew from all results.

    remarks: what the run found beside times, a sentence each.
    """
    machine = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = RESULTS / machine / f"{date.today().isoformat()}_{benchmark}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": benchmark,
        "machine": device_name(device),
        "threads": threads,
        "commit": _commit(),
        "versions": {name: _version(name) for name in ("torch", "numpy", "transformers", "triton")}
        | {"python": platform.python_version()},
        "remarks": list(remarks),
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    write_results_page()
    return path


def write_results_page() -> None:
    """RESULTS.md, from the JSON files."""
    lines = ["# Measured", "", "Written by the benchmarks; `openmimo bench` runs them. Ratio: peer time over ours.", ""]
    for path in sorted(RESULTS.glob("*/*.json")):
        result = json.loads(path.read_text())
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
        lines += [
            f"## {result['benchmark']}, {path.stem[:10]}",
            "",
            f"{result['machine']}, {result['threads']} threads; {versions}; commit {result['commit']}.",
            "",
            "| what | ours, ms | peer, ms | ratio | goal | floor, ms | peer | note |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
        ]
        for row in result["rows"]:
            cells = [
                row["name"], f"{row['ours_ms']:.2f}", _shown(row["peer_ms"]), _shown(row["ratio"], "x"),
                _shown(row["goal"], "x"), _shown(row["floor_ms"]), row["peer"], row["note"],
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        if result.get("remarks"):
            lines += [*(f"- {remark}" for remark in result["remarks"]), ""]
    (RESULTS.parent / "RESULTS.md").write_text("\n".join(lines))


def _shown(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()
