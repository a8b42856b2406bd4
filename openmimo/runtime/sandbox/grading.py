"""Judges a Python solution by unit tests: its inputs go into a jail, what comes out is compared outside of it.

Nothing that the solution does to the checker, to `==` or to the result channel can help it: what it must produce is
known to the host only. One bool per test, for rewards that weigh tests by difficulty (MiMo-7B, section 3.3.1).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from openmimo.core.errors import ConfigError
from openmimo.runtime.sandbox.jailed_tests import decode, encode
from openmimo.runtime.sandbox.records import SandboxLimits, SandboxResult

RUNNER = Path(__file__).with_name("jailed_tests.py")


@dataclass(frozen=True)
class CallTest:
    """A call of the solution's function, and its value. Plain data: numbers, text, bytes, and containers of them."""

    arguments: Sequence[Any]
    expected: Any
    keywords: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamTest:
    """What the program reads from stdin, and what it must write to stdout."""

    stdin: str
    expected: str


@dataclass(frozen=True)
class TestOutcome:
    """Whether one test passed, and if not, why (partly in the solution's words, so not to be trusted)."""

    __test__ = False  # for pytest: not a class of tests

    passed: bool
    reason: str = ""


class Runner(Protocol):
    """A Sandbox or a SandboxPool."""

    limits: SandboxLimits

    def run(self, program: str, files: None = None, stdin: bytes = b"") -> SandboxResult:
        """Runs Python source."""


def grade(
    runner: Runner,
    source: str,
    tests: Sequence[CallTest] | Sequence[StreamTest],
    *,
    function: str | None = None,
    test_seconds: float = 2.0,
) -> list[bool]:
    """Whether the solution passes each test, in order. As `outcomes`, without the reasons."""
    return [outcome.passed for outcome in outcomes(runner, source, tests, function=function, test_seconds=test_seconds)]


def outcomes(
    runner: Runner,
    source: str,
    tests: Sequence[CallTest] | Sequence[StreamTest],
    *,
    function: str | None = None,
    test_seconds: float = 2.0,
) -> list[TestOutcome]:
    """Runs the solution on every test, each in a process of its own, and compares what came out.

    function: for CallTests, the name that is called, or "Class.method" (the class is made without arguments).
    test_seconds: for each test; the runner's wall limit holds for all of them together, and tests that it cuts off
    have not passed. Values are equal as in Python, but tuples equal lists, and floats equal what is within 1e-6 of
    them; stdout is compared without blanks at the ends of lines and of the whole.
    Raises ConfigError for tests of the wrong kind, JailError if the jail breaks down.
    """
    if not tests:
        return []
    wanted = CallTest if function else StreamTest
    if not all(isinstance(test, wanted) for test in tests):
        raise ConfigError("CallTests need function=..., StreamTests must not have it; the two cannot be mixed.")
    job = {
        "source": source,
        "function": function,
        "tests": [_inputs(test) for test in tests],
        "seconds": test_seconds,
        "most_bytes": runner.limits.output_bytes,
    }
    ended = runner.run(RUNNER.read_text(), stdin=json.dumps(job).encode())
    reports = _reports(ended.result)
    lost = TestOutcome(False, f"not reached: the run ended with {ended.killed_by or f'exit code {ended.exit_code}'}")
    return [_judge(test, reports[number]) if number in reports else lost for number, test in enumerate(tests)]


def _inputs(test: CallTest | StreamTest) -> dict:
    """What of a test goes into the jail."""
    if isinstance(test, StreamTest):
        return {"stdin": test.stdin}
    return {"arguments": encode(list(test.arguments)), "keywords": encode(dict(test.keywords))}


def _reports(result: bytes) -> dict[int, dict]:
    """The reports by test, the first of each. The solution may have written here too: anything odd is left out."""
    reports: dict[int, dict] = {}
    for line in result.split(b"\n"):
        try:
            report = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(report, dict) and type(report.get("number")) is int and isinstance(report.get("written"), str):
            reports.setdefault(report["number"], report)
    return reports


def _judge(test: CallTest | StreamTest, report: dict) -> TestOutcome:
    """Compares what a test brought out with what it should have."""
    status, written = report.get("status"), report["written"]
    if status is None:
        return TestOutcome(False, "stopped: too slow, or too much output")
    if isinstance(test, StreamTest):
        if status != 0:
            return TestOutcome(False, f"exit code {status}")
        passed = _lines(written) == _lines(test.expected)
        return TestOutcome(passed, "" if passed else f"wrote {written[:200]!r}")
    try:
        answer = json.loads(written)
        if "error" in answer:
            return TestOutcome(False, f"raised {str(answer['error'])[:300]}")
        value = decode(answer["value"])
        passed = equal(value, test.expected)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return TestOutcome(False, f"no value came out; exit code {status}")
    return TestOutcome(passed, "" if passed else f"returned {_shown(value)}")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _shown(value: Any) -> str:
    try:
        return repr(value)[:200]
    except (ValueError, RecursionError):  # an int of thousands of digits
        return f"a {type(value).__name__}"


def equal(value: Any, expected: Any) -> bool:
    """Python's equality of plain data, but tuples equal lists, and floats equal what is within 1e-6 of them."""
    if isinstance(expected, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(value) == len(expected) and all(map(equal, value, expected))
    if isinstance(expected, dict):
        same_keys = isinstance(value, dict) and value.keys() == expected.keys()
        return same_keys and all(equal(value[key], expected[key]) for key in expected)
    if isinstance(value, float) or isinstance(expected, float):
        numbers = all(isinstance(number, (int, float)) for number in (value, expected))
        both_nan = value != value and expected != expected
        return numbers and (both_nan or math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-9))
    return value == expected
