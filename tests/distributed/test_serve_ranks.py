"""`openmimo serve --tp`: replies are those of one device, and no process outlives another by more than seconds."""

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import start_command
from tiny_checkpoint import save_tiny_checkpoint

from openmimo.core.records import SamplingParams
from openmimo.engine.llm import LLM

pytestmark = pytest.mark.slow
BODY = {"prompt": "The quick brown", "max_tokens": 12, "temperature": 0.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("served") / "model")


class Running:
    """A server of two ranks, in a process of its own."""

    def __init__(self, checkpoint: Path, errors: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.errors = errors
        options = ["--tp", "2", "--ep", "--device", "cpu", "--threads", "2", "--port", str(self.port)]
        self.process = start_command(["serve", str(checkpoint), *options], errors)

    def answers(self) -> bool:
        try:
            return self.request("GET", "/health").status == 200
        except OSError:
            return False

    def request(self, method: str, path: str, body: dict | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        return connection.getresponse()

    def member(self) -> int:
        """The process of rank 1."""
        pid = self.process.pid
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        (found,) = [child for child in children if b"engine.member" in Path(f"/proc/{child}/cmdline").read_bytes()]
        return found

    def exit_code(self) -> int | None:
        self.process.join(60)
        return self.process.exitcode


@contextmanager
def running(checkpoint: Path, errors: Path) -> Iterator[Running]:
    server = Running(checkpoint, errors)
    try:
        deadline = time.monotonic() + 120
        while not server.answers():
            assert server.process.is_alive() and time.monotonic() < deadline, errors.read_text()
            time.sleep(0.1)
        yield server
    finally:
        server.process.kill()
        server.process.join()


def has_ended(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_replies_are_those_of_one_device_until_a_rank_is_killed(checkpoint, tmp_path):
    with running(checkpoint, tmp_path / "errors") as server:
        (expected,) = LLM(checkpoint).generate(BODY["prompt"], SamplingParams(max_tokens=12, temperature=0.0))
        reply = json.load(server.request("POST", "/v1/completions", BODY))
        assert reply["choices"][0]["text"] == expected.text
        assert json.load(server.request("GET", "/health"))["ranks"] == 2
        assert b"openmimo_ranks 2.0" in server.request("GET", "/metrics").read()
        stream = server.request(
            "POST", "/v1/completions", BODY | {"max_tokens": 4000, "ignore_eos": True, "stream": True}
        )
        assert stream.readline().startswith(b"data: {")
        os.kill(server.member(), signal.SIGKILL)
        last = [line for line in stream.read().splitlines() if line.startswith(b"data: ")][-1]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_error"
        assert server.exit_code() == 1
        assert "rank 1 of 2" in server.errors.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_the_server(checkpoint, tmp_path, number):
    with running(checkpoint, tmp_path / "errors") as server:
        member = server.member()
        os.kill(server.process.pid, number)
        assert has_ended(member)
        assert server.exit_code() == (0 if number == signal.SIGINT else -number)
