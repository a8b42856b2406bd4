"""Reward by the difficulty of tests, compared with values computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmimo.core.errors import ConfigError
from openmimo.data.tasks._graded_tests import difficulty_groups, soft_reward, strict_reward

# pass rates 1.0, 0.75, 0.5, 0.25, 0.0
TABLE = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=bool)


def test_groups_go_from_often_passed_to_never_passed():
    assert difficulty_groups(TABLE, 5) == ((0,), (1,), (2,), (3,), (4,))
    assert difficulty_groups(TABLE, 2) == ((0, 1), (2, 3, 4))
    assert difficulty_groups(TABLE, 1) == ((0, 1, 2, 3, 4),)
    assert difficulty_groups(TABLE[:, [4, 0]], 3) == ((1,), (0,))  # the middle range has no test


def test_rewards_worked_out_by_hand():
    groups = ((0, 1), (2, 3), (4,))
    all_but_one_easy = (True, False, True, True, True)
    assert strict_reward(all_but_one_easy, groups) == 0.0
    assert soft_reward(all_but_one_easy, groups) == pytest.approx(1 / 6 + 1 / 3 + 1 / 3)
    easy_and_half = (True, True, True, False, True)
    assert strict_reward(easy_and_half, groups) == pytest.approx(1 / 3)
    assert soft_reward(easy_and_half, groups) == pytest.approx(1 / 3 + 1 / 6 + 1 / 3)
    assert strict_reward(easy_and_half, groups, [20.0, 30.0, 50.0]) == 20.0
    assert soft_reward(easy_and_half, groups, [20.0, 30.0, 50.0]) == 20.0 + 15.0 + 50.0
    assert strict_reward([True] * 5, groups) == pytest.approx(1.0)


@given(st.data())
def test_strict_is_at_most_soft_and_more_passes_never_cost(data):
    num_solutions, num_tests = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    bits = st.lists(st.booleans(), min_size=num_tests, max_size=num_tests)
    table = np.array(data.draw(st.lists(bits, min_size=num_solutions, max_size=num_solutions)), dtype=bool)
    groups = difficulty_groups(table, data.draw(st.integers(1, 5)))
    assert sorted(test for group in groups for test in group) == list(range(num_tests))
    rates = [table[:, list(group)].mean(axis=0) for group in groups]
    assert all(harder.max() < easier.min() for easier, harder in zip(rates, rates[1:], strict=False))
    fewer = data.draw(bits)
    more = [a or b for a, b in zip(fewer, data.draw(bits), strict=True)]
    for reward in (strict_reward, soft_reward):
        assert 0.0 <= reward(fewer, groups) <= reward(more, groups) + 1e-12
        assert reward([True] * num_tests, groups) == pytest.approx(1.0)
        assert reward([False] * num_tests, groups) == 0.0
    assert strict_reward(fewer, groups) <= soft_reward(fewer, groups) + 1e-12


@pytest.mark.parametrize("table", [np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(3)])
def test_a_table_without_anything_is_refused(table):
    with pytest.raises(ConfigError, match="at least one solution and one test"):
        difficulty_groups(table, 2)


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="num_groups is 0"):
        difficulty_groups(TABLE, 0)
    with pytest.raises(ConfigError, match="2 groups of tests and 1 scores"):
        soft_reward([True] * 5, ((0, 1), (2, 3, 4)), [1.0])
    with pytest.raises(ConfigError, match="at least 0 per group"):
        strict_reward([True] * 5, ((0, 1), (2, 3, 4)), [1.0, -1.0])
