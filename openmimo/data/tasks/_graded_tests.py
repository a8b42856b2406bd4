"""Rewards from tests of different difficulty (MiMo-7B, section 3.3.1).

An all-or-nothing reward is sparse for a long program. Instead, tests are grouped by pass rate, and each group has a
score, like the subtasks of a programming contest. The strict reward pays for a group only if all tests of this group
and of all easier groups pass. The soft reward pays for every test.
"""

from collections.abc import Sequence

import numpy as np

from openmimo.core.errors import ConfigError

Groups = tuple[tuple[int, ...], ...]


def difficulty_groups(passed: np.ndarray, num_groups: int) -> Groups:
    """Group tests by pass rate, the easiest group first.

    Args:
        passed: bool [solutions, tests], the results of many solutions of mixed quality.
        num_groups: Number of equal ranges of the pass rate. Ranges without a test are omitted.

    Returns:
        The test indices of each group.

    Raises:
        ConfigError: There are no solutions or no tests, or `num_groups` is below 1.
    """
    passed = np.asarray(passed, dtype=bool)
    if passed.ndim != 2 or not passed.size:
        raise ConfigError("Grouping tests needs a table of results with at least one solution and one test.")
    if num_groups < 1:
        raise ConfigError(f"num_groups is {num_groups}; it must be at least 1.")
    failures = (~passed).sum(axis=0)
    levels = np.minimum(failures * num_groups // len(passed), num_groups - 1)
    groups = (tuple(np.flatnonzero(levels == level).tolist()) for level in range(num_groups))
    return tuple(group for group in groups if group)


def strict_reward(passed: Sequence[bool], groups: Groups, scores: Sequence[float] | None = None) -> float:
    """Return the sum of the scores of the groups before the first one with a failed test.

    Args:
        passed: Whether the solution passes each test.
        groups: Test indices of each group, the easiest first.
        scores: Score of each group; None divides 1.0 equally.
    """
    reward = 0.0
    for group, score in zip(groups, _scores(groups, scores), strict=True):
        if not all(passed[test] for test in group):
            return reward
        reward += score
    return reward


def soft_reward(passed: Sequence[bool], groups: Groups, scores: Sequence[float] | None = None) -> float:
    """Return the sum over groups of score times pass rate. The arguments are those of `strict_reward`."""
    shares = (sum(bool(passed[test]) for test in group) / len(group) for group in groups)
    return sum(score * share for score, share in zip(_scores(groups, scores), shares, strict=True))


def _scores(groups: Groups, scores: Sequence[float] | None) -> Sequence[float]:
    if scores is None:
        return [1.0 / len(groups)] * len(groups)
    if len(scores) != len(groups) or min(scores, default=0.0) < 0.0:
        raise ConfigError(
            f"There are {len(groups)} groups of tests and {len(scores)} scores; give one score of at least 0 per group."
        )
    return scores
