"""Checks of one client: `python NAME_check.py URL FOLDER` runs them against a server and prints JSON lines."""

import importlib.metadata
import json
import sys
import time
import traceback
from collections.abc import Callable

MODEL = "tiny"  # the name under which the checkpoint is served
Check = Callable[[str, str], None]
_CHECKS: list[tuple[str, Check]] = []


def check(name: str) -> Callable[[Check], Check]:
    """Register a function of the server's URL and the checkpoint's folder, which raises if the client fails."""

    def register(function: Check) -> Check:
        _CHECKS.append((name, function))
        return function

    return register


def main(*packages: str) -> None:
    """Run all checks. The lines on standard output have the keys check, problem (empty: passed) and seconds."""
    url, folder = sys.argv[1:3]
    out, sys.stdout = sys.stdout, sys.stderr
    versions = {package: importlib.metadata.version(package) for package in packages}
    print(json.dumps({"versions": versions}), file=out, flush=True)
    for name, function in _CHECKS:
        start, problem = time.monotonic(), ""
        try:
            function(url, folder)
        except Exception as error:  # every failure of a foreign client is a result
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}"
        print(
            json.dumps({"check": name, "problem": problem, "seconds": time.monotonic() - start}), file=out, flush=True
        )
