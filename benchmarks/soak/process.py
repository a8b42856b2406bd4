"""Runs `openmimo serve` in a process and reads its address, resource usage and exit status. Requires Linux."""

import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.engine_models import med
from benchmarks.soak.load import CORPUS
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import save_model
from openmimo.model.mimo import MiMo
from openmimo.model.presets import tiny

_START_SECONDS = 300  # on an accelerator, kernels are compiled and graphs captured
_POSITIONS = 2048
_MED_POSITIONS, _MED_VOCABULARY = 2048, 32_768
_TEXT_SUFFIXES = (".py", ".md", ".c", ".h", ".js")


class ServerProcess:
    """A running server.

    Attributes:
        url: Its address.
        log: File with its standard error.
    """

    def __init__(self, arguments: list[str], log: Path):
        """Starts the server and waits until it listens.

        Args:
            arguments: Arguments of `openmimo serve`.
            log: File for its standard error.

        Raises:
            RuntimeError: The server ended or did not listen in time.
        """
        self.log = log
        environment = {name: value for name, value in os.environ.items() if name != "OPENMIMO_API_KEY"}
        # MTP heads with random weights are no better than chance, about which the engine warns.
        environment["PYTHONWARNINGS"] = "ignore::UserWarning:openmimo.engine.runner"
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "openmimo", "serve", *arguments, "--host", "127.0.0.1", "--port", "0"],
                stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True,
            )  # fmt: skip
        self.url = self._read_url()

    @property
    def resident_bytes(self) -> int:
        """Current resident memory; 0 after the process ended."""
        lines = [line for line in self._read("status").splitlines() if line.startswith("VmRSS")]
        return int(lines[0].split()[1]) * 1024 if lines else 0

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all threads since the start."""
        fields = self._read("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def core_wait_seconds(self) -> float:
        """Time in which threads of the process waited for a core."""
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[1]) for task in tasks) / 1e9

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._process.terminate()

    def wait(self, seconds: float) -> int | None:
        """Waits at most `seconds` for the exit status; returns None if the process still runs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Kills the process if it still runs."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def _read(self, name: str) -> str:
        return Path(f"/proc/{self._process.pid}/{name}").read_text()

    def _read_url(self) -> str:
        watchdog = threading.Timer(_START_SECONDS, self._process.kill)
        watchdog.start()
        try:
            for line in self._process.stdout:
                if found := re.search(r"http://\S+", line):
                    return found.group()
                print(line, end="", flush=True)
        finally:
            watchdog.cancel()
        self.kill()
        raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}")


def save_random_tiny(folder: Path) -> None:
    """Writes a checkpoint of the `tiny` preset with random weights, 2,048 positions, and a tokenizer."""
    tokenizer = Tokenizer.train(CORPUS, vocab_size=tiny().vocab_size)
    model = MiMo(replace(tiny(), vocab_size=tokenizer.vocab_size, max_positions=_POSITIONS))
    model.initialize(torch.Generator().manual_seed(0))
    save_model(model, folder)
    tokenizer.save(folder)


def save_random_med(folder: Path, device: torch.device) -> None:
    """Writes `med` with random bfloat16 weights, 2,048 positions, and a tokenizer of this project's texts."""
    tokenizer = Tokenizer.train(_project_texts(), vocab_size=_MED_VOCABULARY)
    config = replace(med(), vocab_size=tokenizer.vocab_size, max_positions=_MED_POSITIONS)
    with torch.device("meta"):
        model = MiMo(config).to(torch.bfloat16)
    model = model.to_empty(device=device)
    model.initialize(torch.Generator(device).manual_seed(0))
    save_model(model, folder)
    tokenizer.save(folder)


def _project_texts() -> list[str]:
    root = Path(__file__).parents[2]
    files = [path for name in ("openmimo", "docs", "tests", "benchmarks") for path in sorted((root / name).rglob("*"))]
    return [path.read_text() for path in files if path.suffix in _TEXT_SUFFIXES]
