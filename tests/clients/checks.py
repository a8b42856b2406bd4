"""Checks of one client: `python NAME_check.py URL SCRIPTED_URL FOLDER AUDIO_URL` runs them and prints JSON lines."""

import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODEL = "tiny"  # the name of the model on both servers
KEY = "secret"  # no server requires one, but most clients do


@dataclass(frozen=True)
class Served:
    """What the clients talk to.

    Attributes:
        url: A server of a small checkpoint with random weights.
        scripted_url: A server whose replies come from `scripted_server.py`.
        folder: The checkpoint.
        audio_url: A server of a small audio model with random weights.
    """

    url: str
    scripted_url: str
    folder: str
    audio_url: str


Check = Callable[[Served], None]
_CHECKS: list[tuple[str, Check]] = []


def check(name: str) -> Callable[[Check], Check]:
    """Register a function that raises if the client fails."""

    def register(function: Check) -> Check:
        _CHECKS.append((name, function))
        return function

    return register


def node_packages() -> Path:
    """The folder of the packages that npm installed."""
    return Path(os.environ["OPENMIMO_NODE"]) / "node_modules"


def main(*packages: str, npm: tuple[str, ...] = ()) -> None:
    """Run all checks. The lines on standard output have the keys check, problem (empty: passed) and seconds.

    Args:
        packages: The Python packages that the first line gives the versions of.
        npm: The packages of npm, likewise.
    """
    served = Served(*sys.argv[1:5])
    out, sys.stdout = sys.stdout, sys.stderr
    versions = {package: importlib.metadata.version(package) for package in packages}
    for package in npm:
        versions[package] = json.loads((node_packages() / package / "package.json").read_text())["version"]
    print(json.dumps({"versions": versions}), file=out, flush=True)
    for name, function in _CHECKS:
        start, problem = time.monotonic(), ""
        try:
            function(served)
        except Exception as error:  # every failure of a foreign client is a result
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}"
        print(
            json.dumps({"check": name, "problem": problem, "seconds": time.monotonic() - start}), file=out, flush=True
        )
