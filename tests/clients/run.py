"""Runs the packages of the field against this checkout's server: `make clients`.

    python tests/clients/run.py CLIENT_PYTHON [NAME ...]

CLIENT_PYTHON is the interpreter of the clients' environment. Names select checks, such as openai (default: all). Prints
the versions and a table of results; the exit status is 1 if a check fails.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CLIENT_SECONDS = 240
START_SECONDS = 120


@contextmanager
def running(*command: str) -> Iterator[str]:
    """The address of a server process, which is terminated at the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = re.search(r"http://[\d.:]+", line)
            if address is None:
                raise SystemExit(f"{' '.join(command)} did not start: {line!r}")
            yield address[0]
        finally:
            process.terminate()


def results_of(script: Path, python: str, arguments: list[str]) -> Iterator[dict]:
    """The JSON lines of one client's checks, and a failed check if the process ends early."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "OPENMIMO_PYTHON": sys.executable,
        "OPENMIMO_ROOT": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(Path(arguments[-1]) / "huggingface"),
    }
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                [python, str(script), *arguments], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
                timeout=CLIENT_SECONDS,
            )  # fmt: skip
            output, problem = done.stdout, "" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired as expired:
            output, problem = (expired.stdout or b"").decode(), f"no end after {CLIENT_SECONDS} s"
        errors.seek(0)
        tail = errors.read()[-3000:]
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    yield from found
    if problem:
        yield {"check": script.stem, "problem": problem, "seconds": time.monotonic() - start}
    if problem or any(result.get("problem") for result in found):
        print(f"--- {script.stem}: the end of its standard error ---\n{tail}", file=sys.stderr)


def main() -> int:
    """Run the checks. Returns the exit status."""
    from tiny_checkpoint import save_tiny_checkpoint

    python, *names = sys.argv[1:]
    scripts = sorted(HERE.glob("*_check.py"))
    if names:
        scripts = [HERE / f"{name}_check.py" for name in names]
    start, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_checkpoint(Path(folder))
        serve = ("-m", "openmimo", "serve", folder, "--port", "0", "--model-name", "tiny", "--model-aliases", folder)
        with running(*serve) as url, running(str(HERE / "scripted_server.py")) as scripted_url:
            for script in scripts:
                for result in results_of(script, python, [url, scripted_url, folder]):
                    show(result)
                    results.append(result)
    checks = [result for result in results if "check" in result]
    failed = sum(bool(result["problem"]) for result in checks)
    print(f"{len(checks) - failed} of {len(checks)} checks passed in {time.monotonic() - start:.0f} s")
    return 1 if failed or not checks else 0


def show(result: dict) -> None:
    """Print one line: the versions of a client's packages, or the result of a check."""
    if "versions" in result:
        print(", ".join(f"{name} {version}" for name, version in result["versions"].items()), flush=True)
        return
    verdict = "FAIL" if result["problem"] else "pass"
    print(f"  {verdict}  {result['seconds']:6.1f} s  {result['check']}", flush=True)
    if result["problem"]:
        print(f"        {result['problem'][:500]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
