"""Runs the packages of the field against this checkout's server: `make clients`.

    python tests/clients/run.py CLIENTS [NAME ...]

CLIENTS is the folder that `make clients` makes: a Python environment, and the packages of npm in its folder `node`.
Names select checks, such as openai (default: all). Prints the versions and a table of results; the exit status is 1 if
a check fails. Clients of npm are skipped if that folder is absent, because there is no node.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CLIENT_SECONDS = 420
CLIENTS_AT_ONCE = 2  # most of their time is spent on imports, by one core
NODE_CLIENTS = ("ai_sdk", "claude_code", "codex")
# Accounts of the user, which no check may use.
_ACCOUNTS = re.compile(r"(ANTHROPIC|CLAUDE|CODEX|HF|LANGSMITH|LITELLM|OPENAI)_.*")
# No client may reach more than this machine: the clients' own settings, and a proxy that refuses what is left.
_OFFLINE = {
    "ALL_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1,localhost", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1",
    "LANGSMITH_TRACING": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "1",
}  # fmt: skip


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


def client_environment(clients: Path, home: Path) -> dict[str, str]:
    """The environment variables of a client: no accounts, no network, and a home folder that is removed."""
    kept = {name: value for name, value in os.environ.items() if not _ACCOUNTS.fullmatch(name) and name != "PYTHONPATH"}
    return {
        **{name: value for name, value in kept.items() if not name.lower().endswith("_proxy")},
        **_OFFLINE,
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "OPENMIMO_NODE": str(clients / "node"),
        "OPENMIMO_PYTHON": sys.executable,
        "OPENMIMO_ROOT": str(ROOT),
    }


def command_of(script: Path, clients: Path) -> list[str]:
    """The command that runs one client's checks. Packages of npm are found from the folder of the script."""
    if script.suffix == ".py":
        return [str(clients / "bin" / "python"), str(script)]
    shutil.copy(script, clients / "node")
    return ["node", script.name]


def results_of(script: Path, clients: Path, arguments: list[str], home: Path) -> list[dict]:
    """The JSON lines of one client's checks, and a failed check if the process ends early."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                [*command_of(script, clients), *arguments], env=client_environment(clients, home), cwd=clients / "node",
                stdout=subprocess.PIPE, stderr=errors, text=True, timeout=CLIENT_SECONDS,
            )  # fmt: skip
            output, problem = done.stdout, "" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired as expired:
            output, problem = (expired.stdout or b"").decode(), f"no end after {CLIENT_SECONDS} s"
        errors.seek(0)
        tail = errors.read()[-3000:]
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if problem:
        found.append({"check": name_of(script), "problem": problem, "seconds": time.monotonic() - start})
    if any(result.get("problem") for result in found):
        print(f"--- {name_of(script)}: the end of its standard error ---\n{tail}", file=sys.stderr)
    return found


def main() -> int:
    """Run the checks. Returns the exit status."""
    from tiny_audio_checkpoint import save_tiny_audio_checkpoint
    from tiny_checkpoint import save_tiny_checkpoint

    clients, *names = Path(sys.argv[1]).absolute(), *sys.argv[2:]
    scripts = sorted([*HERE.glob("*_check.py"), *HERE.glob("*_check.mjs")], key=lambda script: script.name)
    if names:
        scripts = [script for script in scripts if name_of(script) in names]
    if not (clients / "node" / "node_modules").exists():
        print(f"skipped, because node is not installed: {', '.join(NODE_CLIENTS)}", flush=True)
        scripts = [script for script in scripts if name_of(script) not in NODE_CLIENTS]
    start, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as home:
        save_tiny_checkpoint(Path(folder))
        serve = ("-m", "openmimo", "serve", folder, "--port", "0", "--model-name", "tiny", "--model-aliases", folder)
        save_tiny_audio_checkpoint(Path(home) / "tiny")
        speak = ("-m", "openmimo", "serve", str(Path(home) / "tiny"), "--port", "0")
        scripted = str(HERE / "scripted_server.py")
        with running(*serve) as url, running(scripted) as scripted_url, running(*speak) as audio_url:
            arguments = [url, scripted_url, folder, audio_url]
            with ThreadPoolExecutor(CLIENTS_AT_ONCE) as pool:
                for found in pool.map(lambda script: results_of(script, clients, arguments, Path(home)), scripts):
                    for result in found:
                        show(result)
                    results += found
    checks = [result for result in results if "check" in result]
    failed = sum(bool(result["problem"]) for result in checks)
    print(f"{len(checks) - failed} of {len(checks)} checks passed in {time.monotonic() - start:.0f} s")
    return 1 if failed or not checks else 0


def name_of(script: Path) -> str:
    """The client of a script."""
    return script.stem.removesuffix("_check")


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
