"""The division of micro-batches over processes.

Processes take micro-batches in turns, in rounds of one kind (`key`), so that all of them call the same modules in the
same order. A process without one in the last round gets a filler, a sample of two tokens without weight:

    packs of domain a, b     a0 a1 a2 | b0 b1
    process 0                a0  a2      b0
    process 1                a1  filler  b1
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeVar

import numpy as np

from openmimo.core.samples import Sample
from openmimo.rl.learning.policy_trainer import PackPlan

Result = TypeVar("Result")


def divided(packs: list[PackPlan], count: int, *, key: Callable[[Sample], str]) -> list[list[PackPlan]]:
    """The micro-batches of each of `count` processes, equally many, in order.

    Args:
        packs: All micro-batches, those of one key next to each other.
        count: The number of processes.
        key: The kind of a sample; see above.
    """
    parts: list[list[PackPlan]] = [[] for _ in range(count)]
    for _, members in groupby(packs, key=lambda pack: key(pack.samples[0])):
        own = list(members)
        own += [_filler(own[0])] * (-len(own) % count)
        for number, part in enumerate(parts):
            part += own[number::count]
    return parts


def joined(packs: list[PackPlan], parts: Sequence[list[PackPlan]], results: Sequence[Sequence[Result]]) -> list[Result]:
    """The result of each pack in the order before `divided`, from the results of each process."""
    by_pack = {
        id(pack): result
        for part, own in zip(parts, results, strict=True)
        for pack, result in zip(part, own, strict=True)
        if not pack.is_filler
    }
    return [by_pack[id(pack)] for pack in packs]


def _filler(like: PackPlan) -> PackPlan:
    """A micro-batch of one sample without weight, of the kind of another."""
    sample = Sample(
        token_ids=np.zeros(2, np.int32),
        loss_mask=np.array([False, True]),
        logprobs=np.zeros(2),
        versions=np.array([-1, 0], np.int32),
        domain=like.samples[0].domain,
        advantages=np.zeros(2),
        weights=np.zeros(2),
        teacher_logprobs=np.zeros(2),
    )
    return PackPlan([sample], None if like.old_logprobs is None else [np.zeros(2)], is_filler=True)
