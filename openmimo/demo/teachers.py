"""Runs the teachers of the demo in separate processes, at most one per core."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openmimo.core import config as config_io
from openmimo.core.errors import UserError
from openmimo.rl.config import RlConfig


def run_teachers(teachers: tuple[RlConfig, ...]) -> dict[str, Any]:
    """Runs or resumes `openmimo rl` for each teacher and waits for all of them.

    Returns:
        `{"models": [...]}`, the model folders in the order of `teachers`.

    Raises:
        UserError: A run failed; the message contains the end of its log.
    """
    running: list[subprocess.Popen] = []
    with ThreadPoolExecutor(max_workers=max(1, min(len(teachers), os.cpu_count() or 1))) as pool:
        try:
            return {"models": list(pool.map(lambda config: _run(config, running), teachers))}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:  # a terminated run saves a checkpoint first
                process.terminate()
            raise


def _run(config: RlConfig, running: list[subprocess.Popen]) -> str:
    folder = Path(config.run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    recipe, log = folder / "teacher.json", folder / "log.txt"
    config_io.save(config, recipe)
    with open(log, "a") as file:
        command = [sys.executable, "-m", "openmimo", "rl", "--from", str(recipe)]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        running.append(process)
        code = process.wait()
    if code:
        raise UserError(f"the run in {folder} ended with exit code {code}. The end of {log}: {log.read_text()[-500:]}")
    return str(folder / "model")
