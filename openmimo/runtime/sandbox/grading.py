"""Grades a Python solution by unit tests: inputs go into a jail, and outputs are compared outside of it.

A solution cannot cheat by changing the checker, `==` or the result channel: only the host knows the expected values.
The result is one bool per test, for rewards that weight tests by difficulty (MiMo-7B, section 3.3.1).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from openmimo.core.errors import ConfigError
from openmimo.runtime.sandbox.compare import ABSOLUTE, RELATIVE, equal, matches
from openmimo.runtime.sandbox.jailed_tests import decode, encode
from openmimo.runtime.sandbox.records import SandboxLimits, SandboxResult

__all__ = ["CallTest", "StreamTest", "TestOutcome", "equal", "grade", "outcomes"]

RUNNER = Path(__file__).with_name("jailed_tests.py")
MAX_SHOWN = 2000


@dataclass(frozen=True)
class CallTest:
    """A call of the solution's function and its expected value: numbers, text, bytes, and containers of them.

    Attributes:
        arguments: Positional arguments.
        expected: The value that the call must return.
        keywords: Keyword arguments.
        relative: Relative tolerance between two floats, as in `math.isclose`. Integers are compared exactly.
        absolute: Absolute tolerance between two floats.
    """

    arguments: Sequence[Any]
    expected: Any
    keywords: Mapping[str, Any] = field(default_factory=dict)
    relative: float = RELATIVE
    absolute: float = ABSOLUTE

    def __post_init__(self):
        if not (0 <= self.relative < 1 and 0 <= self.absolute < math.inf):
            raise ConfigError(
                f"A CallTest has the tolerances relative={self.relative} and absolute={self.absolute}; the first must "
                "be at least 0 and below 1, the second at least 0 and finite."
            )


@dataclass(frozen=True)
class StreamTest:
    """The text that the program reads from stdin, and the text that it must write to stdout."""

    stdin: str
    expected: str


@dataclass(frozen=True)
class TestOutcome:
    """Whether one test passed, and otherwise why. The reason may quote the solution, so it is untrusted text."""

    __test__ = False  # for pytest: not a class of tests

    passed: bool
    reason: str = ""


class Runner(Protocol):
    """Runs programs: a Sandbox or a SandboxPool."""

    limits: SandboxLimits

    def run(self, program: str, files: None = None, stdin: bytes = b"") -> SandboxResult:
        """Run Python source."""


def grade(
    runner: Runner,
    source: str,
    tests: Sequence[CallTest] | Sequence[StreamTest],
    *,
    function: str | None = None,
    test_seconds: float = 2.0,
) -> list[bool]:
    """Return whether the solution passes each test, in order: `outcomes` without the reasons."""
    return [outcome.passed for outcome in outcomes(runner, source, tests, function=function, test_seconds=test_seconds)]


def outcomes(
    runner: Runner,
    source: str,
    tests: Sequence[CallTest] | Sequence[StreamTest],
    *,
    function: str | None = None,
    test_seconds: float = 2.0,
) -> list[TestOutcome]:
    """Run the solution on each test in a separate process, and compare the outputs.

    Values are compared by `compare.equal`: as in Python, except that tuples equal lists, and floats are equal within
    the tolerance of the test. stdout is compared without trailing blanks of lines and without surrounding blank lines.

    Args:
        runner: Runs the program.
        source: The solution.
        tests: All CallTests, or all StreamTests.
        function: For CallTests, the called function, or "Class.method" (the class is created without arguments).
        test_seconds: Time limit of each test. The runner's wall limit holds for all tests together; a test that it cuts
            off has failed.

    Raises:
        ConfigError: The tests are of the wrong kind or not plain data.
        JailError: The jail failed.
    """
    if not tests:
        return []
    kind: type = CallTest if function else StreamTest
    if not all(isinstance(test, kind) for test in tests):
        raise ConfigError("CallTests need function=..., StreamTests must not have it; the two cannot be mixed.")
    job = {
        "source": source,
        "function": function,
        "tests": [_inputs(test) for test in tests],
        "seconds": test_seconds,
        "most_bytes": runner.limits.output_bytes,
    }
    ended = runner.run(RUNNER.read_text(), stdin=json.dumps(job).encode())
    reports = _reports(ended.result, len(tests), runner.limits.output_bytes)
    lost = TestOutcome(False, f"not reached: the run ended with {ended.killed_by or f'exit code {ended.exit_code}'}")
    return [_outcome(tests[number], reports[number]) if number in reports else lost for number in range(len(tests))]


def _inputs(test: CallTest | StreamTest) -> dict:
    """Return the part of a test that is sent into the jail."""
    if isinstance(test, StreamTest):
        return {"stdin": test.stdin}
    try:
        encode(test.expected)
        return {"arguments": encode(list(test.arguments)), "keywords": encode(dict(test.keywords))}
    except TypeError as error:
        raise ConfigError(f"A CallTest contains a value that is not plain data: {error}.") from error


def _reports(result: bytes, count: int, most_characters: int) -> dict[int, dict]:
    """Return the first report of each test. The solution can write to this channel, so malformed lines are ignored."""
    reports: dict[int, dict] = {}
    for line in result.split(b"\n"):
        try:
            report = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(report, dict):
            continue
        number, written = report.get("number"), report.get("written")
        if type(number) is int and 0 <= number < count and isinstance(written, str) and len(written) <= most_characters:
            reports.setdefault(number, report)
    return reports


def _outcome(test: CallTest | StreamTest, report: dict) -> TestOutcome:
    """Compare the output of a test with its expected value."""
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
        passed = matches(answer["value"], encode(test.expected), test.relative, test.absolute)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return TestOutcome(False, f"there is no value; exit code {status}")
    return TestOutcome(passed, "" if passed else f"returned {_shown(answer['value'], len(written))}")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _shown(coded: Any, length: int) -> str:
    """Describe a value. Long values are not decoded, because decoding builds sets of untrusted values."""
    try:
        return repr(decode(coded))[:200] if length <= MAX_SHOWN else f"a value of {length} characters"
    except (ValueError, TypeError, AttributeError, RecursionError):  # such as an int of thousands of digits
        return f"a {type(coded).__name__}"
