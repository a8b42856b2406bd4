"""Parts of a demo, whose results are files: a demo that was interrupted continues with the first part without one."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from openmimo.core.files import write_text_atomic
from openmimo.core.metrics import duration_text


class Parts:
    """Runs each part once and stores its result and wall time in `<folder>/results`.

    Args:
        folder: The demo's folder.
        console: Console for titles and times.
        reference_seconds: Wall time of each part on the reference machine, by name, where it is known.
        reference_machine: What that machine is.
    """

    def __init__(self, folder: Path, console: Console, reference_seconds: dict[str, int], reference_machine: str):
        self.folder = folder / "results"
        self.console = console
        self.reference_seconds, self.reference_machine = reference_seconds, reference_machine

    def run(self, name: str, title: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the result of a part. Calls `work` only if there is no stored result."""
        path = self.folder / f"{name}.json"
        if path.exists():
            self.console.print(f"[bold]{title}[/]")
            return json.loads(path.read_text())["result"]
        known = self.reference_seconds.get(name)
        expected = "" if known is None else f"  ({duration_text(known)} on the reference machine)"
        self.console.print(f"[bold]{title}[/]{expected}", highlight=False, soft_wrap=True)
        started = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
        write_text_atomic(path, json.dumps({"result": result, "seconds": seconds}, indent=2) + "\n")
        return result

    def print_time(self) -> None:
        """Prints how long the parts without a result took on the reference machine; nothing if all have one."""
        unfinished = [name for name in self.reference_seconds if not (self.folder / f"{name}.json").exists()]
        left = sum(self.reference_seconds[name] for name in unfinished)
        if left:
            self.console.print(
                f"Measured on {self.reference_machine}: {duration_text(left)} in all.", highlight=False, soft_wrap=True
            )

    def seconds(self) -> dict[str, float]:
        """Returns the wall time of each part in the process that finished it."""
        return {path.stem: json.loads(path.read_text())["seconds"] for path in sorted(self.folder.glob("*.json"))}
