"""When a step may end: when its batch is full, and no group that started earlier is still running.

Long answers finish late. A batch of whatever finished first would be a batch of short answers; so the groups of a batch
are chosen by when they started, never by when they finished (MiMo-7B, section 3.4).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from openmimo.rl.scheduling.groups import Group


@dataclass
class Selection:
    """What could be learned from now.

    groups: the batch so far. taken: how many of each source are in it. behind: how many more of each source are
    accepted, but have to wait for an unfinished group that started before them.
    """

    groups: list[Group] = field(default_factory=list)
    taken: dict[str, int] = field(default_factory=dict)
    behind: dict[str, int] = field(default_factory=dict)


def holds_up(group: Group, *, version: int, wait_age: int) -> bool:
    """Whether groups of its source that started after this unfinished one have to wait for it.

    With wait_age 0 always. Above, only once its oldest token is so many versions old: younger ones are not dropped but
    carried over, so that they come into a batch later, and no kind of answer is left out.
    """
    return group.staleness(version) >= wait_age


def select(
    groups: Iterable[Group], quotas: Mapping[str, int], *, version: int, wait_age: int, max_partial: int
) -> Selection:
    """The earliest-started accepted groups of each source, up to its quota.

    groups: in the order in which they started. max_partial: samples with tokens older than `version`, at most; a group
    that does not fit is left for later.
    """
    selection = Selection(taken=dict.fromkeys(quotas, 0), behind=dict.fromkeys(quotas, 0))
    held_up: set[str] = set()
    for group in groups:
        source = group.source
        if selection.taken[source] + selection.behind[source] == quotas[source]:
            continue
        if not group.accepted:
            if holds_up(group, version=version, wait_age=wait_age):
                held_up.add(source)
            continue
        num_partial = group.num_partial(version)
        if num_partial > max_partial:
            continue
        max_partial -= num_partial
        if source in held_up:
            selection.behind[source] += 1
        else:
            selection.groups.append(group)
            selection.taken[source] += 1
    return selection
