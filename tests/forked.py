"""Commands in forked processes: these have imported the package already, which takes longer than many tests."""

import multiprocessing
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing.process import BaseProcess
from pathlib import Path

from openmimo import cli


def start_command(arguments: list[str], errors: Path) -> BaseProcess:
    """Starts `openmimo` with the arguments. Its standard error goes to a file, its standard output nowhere."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(arguments, errors))
    process.start()
    return process


def _run(arguments: list[str], errors: Path) -> None:
    sys.argv = ["openmimo", *arguments]
    with open(errors, "w") as stream, redirect_stderr(stream), redirect_stdout(StringIO()):
        cli.main()
