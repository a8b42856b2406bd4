"""Comparing a solution's result with the expected value: integers exactly, floats within the test's tolerance."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmimo.core.errors import ConfigError
from openmimo.runtime.sandbox import CallTest, Sandbox, SandboxLimits, SandboxUnavailableError, grade
from openmimo.runtime.sandbox.compare import matches
from openmimo.runtime.sandbox.grading import equal
from openmimo.runtime.sandbox.jailed_tests import encode


@pytest.mark.parametrize(
    ("value", "expected", "is_equal"),
    [
        (1000000.0, 1000001, False), (500000.5, 500000, False), (1000001, 1000000.0, False), (1e16, 10**16 + 1, False),
        (float(2**53), 2**53 + 1, False), (1000001, 1000000, False), (4.0, 4, True), (4, 4.0, True), (True, 1, True),
        (0.1 + 0.2, 0.3, True), (0.31, 0.3, False), (math.nan, math.nan, True), (math.inf, math.inf, True),
        (math.inf, -math.inf, False), (1e-12, 0.0, True), (0, 1e-12, False), (3.0000001, 3, False),
        ([1000000.0], [1000001], False), ({"a": 1000000.0}, {"a": 1000001}, False), ((1, 2), [1, 2], True),
        ({1000000.0}, {1000001}, False), ({1.0, 2}, {1, 2.0}, True), ({1: "a"}, {1.0: "a"}, True), ({True}, {1}, True),
        ({(1, 2), "x", None, b"y"}, {None, "x", b"y", (1.0, 2)}, True), ({frozenset([1])}, {frozenset([2])}, False),
        ({1, 2}, [1, 2], False), ("1", 1, False), (None, 0, False), (b"a", "a", False), ([], (), True), ({}, [], False),
        ({"1": 0}, {1: 0}, False), ({None: 0}, {"null": 0}, False), ([1], [1, 2], False), (2**70, 2.0**70, True),
    ],
)  # fmt: skip
def test_equality(value, expected, is_equal):
    assert equal(value, expected) is is_equal


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = scalars | st.tuples(scalars, scalars) | st.frozensets(scalars, max_size=3)
values = st.recursive(
    scalars | st.frozensets(keys, max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@given(values, values)
def test_it_is_pythons_equality_where_no_tolerance_holds(value, other):
    for one, two in ((value, value), (value, other), (other, value)):
        assert equal(one, two, relative=0, absolute=0) is (one == two)
        sent = json.loads(json.dumps(encode(one)))
        assert matches(sent, encode(two), 0, 0) is (one == two)


def test_half_a_number_does_not_pass_for_its_floor():
    """In a jail, an error of one in a million fails; a test may set another tolerance for floats."""
    try:
        sandbox = Sandbox()
    except SandboxUnavailableError as error:
        pytest.skip(str(error))
    tests = [CallTest([n], n // 2) for n in (10, 1_000_001, 10**15 + 1)]
    assert grade(sandbox, "def f(n): return n / 2", tests, function="f") == [True, False, False]
    assert grade(sandbox, "def f(n): return n // 2", tests, function="f") == [True, True, True]
    tests = [CallTest([], 1.0), CallTest([], 1.0, relative=0.01), CallTest([], 1.0, absolute=0.01)]
    assert grade(sandbox, "def f(): return 1.005", tests, function="f") == [False, True, True]


@pytest.mark.parametrize(
    "tolerances", [{"relative": -1}, {"relative": 1.0}, {"absolute": math.inf}, {"relative": math.nan}]
)
def test_impossible_tolerances_are_refused(tolerances):
    with pytest.raises(ConfigError, match="tolerances"):
        CallTest([], 1.0, **tolerances)


class Unstarted:
    """A runner that fails the test if it is called."""

    limits = SandboxLimits()


def test_expected_values_that_are_not_plain_data_are_refused():
    with pytest.raises(ConfigError, match="object is not plain data"):
        grade(Unstarted(), "", [CallTest([], object())], function="f")
