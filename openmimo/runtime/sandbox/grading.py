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
from openmimo.runtime.sandbox.compare import ABSOLUTE, RELATIVE, equal, matches
from openmimo.runtime.sandbox.jailed_tests import decode, encode
from openmimo.runtime.sandbox.records import SandboxLimits, SandboxResult

__all__ = ["CallTest", "StreamTest", "TestOutcome", "equal", "grade", "outcomes"]

RUNNER = Path(__file__).with_name("jailed_tests.py")
MAX_SHOWN = 2000


@dataclass(frozen=True)
class CallTest:
    """A call of the solution's function, and its value. Plain data: numbers, text, bytes, and containers of them.

    relative, absolute: how far a float may be from an expected float, as in `math.isclose`. Integers are exact.
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
    have not passed. Values are equal as `compare.equal` says: as in Python, but tuples equal lists, and two floats are
    equal within the test's tolerance; stdout is compared without blanks at the ends of lines and of the whole.
    Raises ConfigError for tests of the wrong kind or not of plain data, JailError if the jail breaks down.
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
    reports = _reports(ended.result, len(tests), runner.limits.output_bytes)
    lost = TestOutcome(False, f"not reached: the run ended with {ended.killed_by or f'exit code {ended.exit_code}'}")
    return [_judge(test, reports[number]) if number in reports else lost for number, test in enumerate(tests)]


def _inputs(test: CallTest | StreamTest) -> dict:
    """What of a test goes into the jail."""
    if isinstance(test, StreamTest):
        return {"stdin": test.stdin}
    try:
        encode(test.expected)
        return {"arguments": encode(list(test.arguments)), "keywords": encode(dict(test.keywords))}
    except TypeError as error:
        raise ConfigError(f"A CallTest holds something else than plain data: {error}.") from error


def _reports(result: bytes, count: int, most_characters: int) -> dict[int, dict]:
    """The reports by test, the first of each. The solution may have written here too: anything odd is left out."""
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
        passed = matches(answer["value"], encode(test.expected), test.relative, test.absolute)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return TestOutcome(False, f"no value came out; exit code {status}")
    return TestOutcome(passed, "" if passed else f"returned {_shown(answer['value'], len(written))}")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _shown(coded: Any, length: int) -> str:
    """A value in a few words. Only short ones are decoded, for that makes sets of what the solution chose."""
    try:
        return repr(decode(coded))[:200] if length <= MAX_SHOWN else f"a value of {length} characters"
    except (ValueError, TypeError, AttributeError, RecursionError):  # such as an int of thousands of digits
        return f"a {type(coded).__name__}"
