"""The sandbox for honest programs: its interface, its working folders, its pool and its grading."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from openmimo.core.errors import ConfigError, UserError
from openmimo.runtime.sandbox import (
    CallTest,
    JailError,
    Sandbox,
    SandboxLimits,
    SandboxPool,
    SandboxUnavailableError,
    StreamTest,
    grade,
    jail,
    outcomes,
    selftest,
)
from openmimo.runtime.sandbox import sandbox as choosing
from openmimo.runtime.sandbox.jailed_tests import decode, encode
from openmimo.runtime.sandbox.selftest import why_not
from openmimo.runtime.sandbox.tiers import TIERS


def working(name: str):
    """A pytest parameter for a tier; if the tier does not work here, it is skipped with the reason."""
    reason = why_not(name)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))


@pytest.fixture(params=[working(name) for name in TIERS])
def sandbox(request):
    return Sandbox(SandboxLimits(wall_seconds=20), request.param, allow_unsafe=True)


def test_source_with_files_and_stdin(sandbox):
    source = "import sys, module\nprint(module.value, open('sub/data').read(), input())\nsys.exit(3)"
    result = sandbox.run(source, {"module.py": "value = 4", "sub/data": b"data"}, b"typed\n")
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"4 data typed\n", b"")
    assert (result.timed_out, result.truncated, result.killed_by, result.result) == (False, False, None, b"")


def test_command(sandbox):
    result = sandbox.run(["sh", "-c", "cat; pwd >&2; kill -SEGV $$"], stdin=b"in")
    assert (result.exit_code, result.stdout, result.killed_by) == (139, b"in", "SIGSEGV")
    assert sandbox.run(["no-such-command"]).exit_code == 127


def test_traceback_and_exit_code_of_a_failing_program(sandbox):
    result = sandbox.run("def fail():\n    raise ValueError('why')\nfail()")
    assert result.exit_code == 1
    assert 'File "main.py", line 2, in fail' in result.error_text
    assert result.error_text.endswith("ValueError: why\n")


def test_hashes_are_the_same_every_time(sandbox):
    assert sandbox.run("print(hash('text'))").stdout == sandbox.run("print(hash('text'))").stdout


def test_the_result_channel_is_apart_from_the_output(sandbox):
    result = sandbox.run("import os\nprint('out')\nos.write(int(os.environ['RESULT_FD']), b'result')")
    assert (result.stdout, result.result) == (b"out\n", b"result")


def test_an_orphan_does_not_hold_up_the_result(sandbox):
    result = sandbox.run("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nprint('done')")
    assert (result.stdout, result.timed_out) == (b"done\n", False)


def test_files_persist_between_commands(sandbox):
    with sandbox.workspace({"tool/a.txt": "one\n"}) as workspace:
        assert workspace.run(["sh", "-c", "echo two >> tool/a.txt; cp tool/a.txt b.txt"]).exit_code == 0
        assert workspace.read("b.txt") == b"one\ntwo\n"
        workspace.write("b.txt", "new")
        workspace.write("deep/er/c.txt", b"\x00\xff")
        assert workspace.run("print(open('b.txt').read(), open('deep/er/c.txt', 'rb').read())").stdout == (
            b"new b'\\x00\\xff'\n"
        )
        home = workspace.paths.work
        assert home.exists()
    assert not home.parent.exists()


def test_many_at_once(sandbox):
    async def squares():
        return await asyncio.gather(*(sandbox.run_async(f"print({n} ** 2)") for n in range(6)))

    assert [int(result.stdout) for result in asyncio.run(squares())] == [n * n for n in range(6)]


def test_empty_programs_are_refused(sandbox):
    for program in ([], ["a\0b"], [1]):
        with pytest.raises(UserError, match="list of words"):
            sandbox.run(program)
    assert sandbox.run("").exit_code == 0


def test_jails_end_with_the_process_that_started_them(sandbox):
    token = f"88.{os.getpid()}"
    host = f"""
from openmimo.runtime.sandbox import Sandbox
Sandbox(tier={sandbox.tier.name!r}, allow_unsafe=True).run(["sh", "-c", "sleep {token}; true"])
"""
    trainer = subprocess.Popen([sys.executable, "-c", host])

    def living():
        return subprocess.run(["pgrep", "-f", f"sleep {token}"], capture_output=True).stdout.split()

    try:
        assert _until(living)
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    assert _until(lambda: not living())


def _until(condition, seconds=20.0):
    waited = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < waited:
        time.sleep(0.05)
    return met


# Limits and refusal


def test_limits_must_be_above_zero():
    with pytest.raises(ConfigError, match="wall_seconds is 0"):
        SandboxLimits(wall_seconds=0)


def test_an_unknown_tier_is_named():
    with pytest.raises(ConfigError, match="'docker' is unknown.*bubblewrap"):
        Sandbox(tier="docker")


def test_without_a_jail_nothing_runs_unless_allowed(monkeypatch):
    monkeypatch.setattr(choosing, "why_not", lambda name: "not here" if TIERS[name].isolates else None)
    with pytest.raises(SandboxUnavailableError) as refusal:
        Sandbox()
    for words in ("bubblewrap: not here", "unshare: not here", "apt-get install bubblewrap", "allow_unsafe=True"):
        assert words in str(refusal.value)
    assert isinstance(refusal.value, UserError)
    assert "UNSAFE" in Sandbox(allow_unsafe=True).describe()
    with pytest.raises(SandboxUnavailableError):
        Sandbox(tier="bubblewrap", allow_unsafe=True)


def test_resource_limits_alone_are_no_jail():
    with pytest.raises(SandboxUnavailableError, match="allow_unsafe was not set"):
        Sandbox(tier="rlimits")


def test_the_self_test_finds_a_jail_that_leaks(monkeypatch):
    """The probe's attacks detect resource limits that claim to isolate."""
    from dataclasses import replace

    leaky = replace(TIERS["rlimits"], name="leaky", isolates=True)
    monkeypatch.setattr(jail, "STORES", ())
    monkeypatch.setitem(selftest.TIERS, "leaky", leaky)
    reason = why_not("leaky")
    for words in ("reaches the network", "reaches sockets of the host", "reads /etc/passwd"):
        assert words in reason


def test_the_self_test_names_what_is_not_installed(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    why_not.cache_clear()
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert why_not("bubblewrap") == "bwrap, setpriv not installed"
    why_not.cache_clear()


def test_a_jail_that_does_not_come_up_is_no_result(sandbox, monkeypatch):
    from dataclasses import replace

    broken = replace(sandbox.tier, command=lambda inner, place, limits: ["sh", "-c", "echo no room >&2; exit 1"])
    sandbox.tier = broken
    with pytest.raises(JailError, match="did not start: no room"):
        sandbox.run("print(1)")


# The pool


def test_pool_runs_jobs_in_fresh_jails(sandbox):
    with SandboxPool(2, sandbox) as pool:
        assert pool.wait_until_warm()
        for number in range(5):
            source = f"import os\nprint({number}, sorted(os.listdir('.')))\nopen('left', 'w').close()"
            assert pool.run(source, {"a": "b"}).text == f"{number} ['a']\n"
        assert pool.run(["cat", "a"], {"a": "b"}).stdout == b"b"
        with pytest.raises(UserError):
            pool.run("", {"../a": "b"})
        assert pool.wait_until_warm()
    assert pool.run("print(1)").stdout == b"1\n"  # a closed pool starts a jail for each call


def test_pool_replaces_jails_that_died(sandbox):
    with SandboxPool(2, sandbox) as pool:
        assert pool.wait_until_warm()
        for _, jail in pool._idle:
            jail.kill()
        assert pool.run("print(1)").stdout == b"1\n"
        assert _until(lambda: len(pool._idle) == 2 and all(jail.alive() for _, jail in pool._idle))


def test_pool_serves_more_threads_than_it_has_jails(sandbox):
    async def squares(pool):
        return await asyncio.gather(*(pool.run_async(f"print({n} ** 2)") for n in range(8)))

    with SandboxPool(2, sandbox) as pool:
        assert [int(result.stdout) for result in asyncio.run(squares(pool))] == [n * n for n in range(8)]


# Grading

VALUES = [
    None, True, 0, -7, 2**70, -(2**5000), 1.5, float("inf"), "text \u2603 \ud800", b"\x00\xff", (1, (2,)), [1, [2]],
    {1, 2}, {(1, 2): "a", "b": [None]}, frozenset([(1, 2)]), {}, {"int": "x"},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_values_survive_the_pipe(value):
    import json

    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value) or isinstance(value, frozenset)


def test_values_travel_both_ways(sandbox):
    tests = [CallTest([value], [value, 1]) for value in VALUES]
    assert grade(sandbox, "def f(x): return [x, 1]", tests, function="f") == [True] * len(tests)


def test_what_counts_as_equal(sandbox):
    source = "def f(kind): return {'tuple': (1, 2), 'near': 0.1 + 0.2, 'far': 0.31, 'bool': True, 'none': None}[kind]"
    tests = [
        CallTest(["tuple"], [1, 2]),
        CallTest(["near"], 0.3),
        CallTest(["far"], 0.3),
        CallTest(["bool"], 1),
        CallTest(["none"], 0),
    ]
    assert grade(sandbox, source, tests, function="f") == [True, True, False, True, False]


def test_methods_keywords_and_the_standard_library(sandbox):
    source = """
from collections import Counter, deque
from dataclasses import dataclass
@dataclass
class Pair:
    left: "int"
class Solution:
    def count(self, text, *, most=1): return Counter(text[:most])
    def queue(self): return deque([Pair(3).left])
"""
    assert grade(sandbox, source, [CallTest(["aab"], {"a": 2}, {"most": 2})], function="Solution.count") == [True]
    assert grade(sandbox, source, [CallTest([], [3])], function="Solution.queue") == [True]


def test_programs_read_stdin_and_write_stdout(sandbox):
    source = (
        "def main():\n    n = int(input())\n    print(*range(n), sep='\\n')\nif __name__ == '__main__':\n    main()"
    )
    tests = [StreamTest("3\n", "0\n1\n2\n"), StreamTest("2", "0 \n1"), StreamTest("1", "1"), StreamTest("x", "")]
    assert grade(sandbox, source, tests) == [True, True, False, False]
    echo = "import sys\nsys.stdout.write(sys.stdin.read())\nexit()"
    long = "line of text\n" * 4000
    assert grade(sandbox, echo, [StreamTest(long, long)]) == [True]


def test_reasons_say_what_happened(sandbox):
    source = "import time\ndef f(x):\n    return time.sleep(60) if x == 2 else 1 // x"
    tests = [CallTest([1], 2), CallTest([0], 1), CallTest([2], 1)]
    reasons = [outcome.reason for outcome in outcomes(sandbox, source, tests, function="f", test_seconds=0.5)]
    assert reasons[0] == "returned 1"
    assert reasons[1].startswith("raised ZeroDivisionError")
    assert reasons[2].startswith("stopped")


def test_grading_through_a_pool(sandbox):
    with SandboxPool(1, sandbox) as pool:
        assert grade(pool, "def f(x): return x + 1", [CallTest([1], 2), CallTest([1], 3)], function="f") == [
            True,
            False,
        ]


def test_tests_of_the_wrong_kind_are_refused(sandbox):
    assert grade(sandbox, "", [], function="f") == []
    for tests, function in (([CallTest([], 1)], None), ([StreamTest("", "")], "f")):
        with pytest.raises(ConfigError, match="cannot be mixed"):
            grade(sandbox, "", tests, function=function)
