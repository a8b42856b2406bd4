"""Reward from many tests of unequal difficulty (MiMo-7B, section 3.3.1).

All-or-nothing reward says little about a long program. Instead tests are grouped by how often they are passed, and each
group is worth a score, as the subtasks of a programming contest are: the strict reward pays for a group only if it and
all easier groups pass whole, the soft one pays for every test.
"""

from collections.abc import Sequence

import numpy as np

from openmimo.core.errors import ConfigError

Groups = tuple[tuple[int, ...], ...]


def difficulty_groups(passed: np.ndarray, num_groups: int) -> Groups:
    """The tests by pass rate, the easiest group first.

    passed: bool [solutions, tests], what many solutions of mixed quality did. The rates from 0 to 1 are divided into
    `num_groups` equal ranges; ranges without a test are left out. Raises ConfigError without solutions or tests.
    """
    passed = np.asarray(passed, dtype=bool)
    if passed.ndim != 2 or not passed.size:
        raise ConfigError("Tests can be grouped only by a table of solutions and tests with at least one of each.")
    if num_groups < 1:
        raise ConfigError(f"num_groups is {num_groups}; it must be at least 1.")
    failures = (~passed).sum(axis=0)
    levels = np.minimum(failures * num_groups // len(passed), num_groups - 1)
    groups = (tuple(np.flatnonzero(levels == level).tolist()) for level in range(num_groups))
    return tuple(group for group in groups if group)


def strict_reward(passed: Sequence[bool], groups: Groups, scores: Sequence[float] | None = None) -> float:
    """The scores of the groups whose tests all pass, up to the first that has a failure.

    passed: of each test, whether the solution passes it. scores: of each group; None shares 1.0 equally.
    """
    reward = 0.0
    for group, score in zip(groups, _scores(groups, scores), strict=True):
        if not all(passed[test] for test in group):
            return reward
        reward += score
    return reward


def soft_reward(passed: Sequence[bool], groups: Groups, scores: Sequence[float] | None = None) -> float:
    """The score of each group times the share of its tests that pass; arguments as in `strict_reward`."""
    shares = (sum(bool(passed[test]) for test in group) / len(group) for group in groups)
    return sum(score * share for score, share in zip(_scores(groups, scores), shares, strict=True))


def _scores(groups: Groups, scores: Sequence[float] | None) -> Sequence[float]:
    if scores is None:
        return [1.0 / len(groups)] * len(groups)
    if len(scores) != len(groups) or min(scores, default=0.0) < 0.0:
        raise ConfigError(
            f"There are {len(groups)} groups of tests and {len(scores)} scores; give each one, not below 0."
        )
    return scores
