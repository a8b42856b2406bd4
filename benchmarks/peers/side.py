"""The protocol of benchmark processes, in the process of the benchmark (see `serving`)."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

_FOLDER = Path(__file__).parent


class NotSupportedError(Exception):
    """The engine does not support the call."""


class Side:
    """An engine in its own process.

    Args:
        name: Name in the results.
        script: A file of this folder.
        python: The interpreter that runs the script.
        threads: CPU threads.
    """

    def __init__(self, name: str, script: str, python: str, *, threads: int):
        self.name = name
        self.versions = ""
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            [python, str(_FOLDER / script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=environment, cwd=_FOLDER.parents[1],
        )  # fmt: skip

    def call(self, method: str, **arguments) -> object:
        """Calls a method of the engine and returns its result.

        Raises:
            NotSupportedError: The engine does not support the call.
            RuntimeError: The call failed. The message contains the traceback or the last output of the engine.
        """
        try:
            self._process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        reply = json.loads(line) if line else {"error": f"the process ended; its last output:\n{self._last_words()}"}
        if "not_supported" in reply:
            raise NotSupportedError(reply["not_supported"])
        if "error" in reply:
            raise RuntimeError(f"{self.name}, {method}: {reply['error']}")
        return reply["result"]

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        return self._log.read()[-3000:]
