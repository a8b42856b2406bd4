"""When a step may end: when its batch is full, and no group that started earlier is still running.

Long responses finish late, so a batch of the groups that finish first would be a batch of short responses. The groups
of a batch are therefore chosen by when they started, never by when they finished (MiMo-7B, section 3.4). For a source
with a quota of 3:

    groups, in order of starting    A        B        C        D        E
    state                        accepted running  accepted accepted running
    selection                      taken     -      behind   behind    -

C and D wait for B, which started before them; E started after them and holds nothing up. When B is accepted, the batch
is A, B, C, and D is surplus. When B is dropped, it is A, C, D. With partial rollouts, B holds the others up only once
its oldest token is `wait_age` versions old; until then the step may end without B, which continues in the next step.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from openmimo.rl.scheduling.groups import Group


@dataclass
class Selection:
    """The groups that the trainer could learn from now.

    Attributes:
        groups: The batch so far, in order of starting.
        taken: By source, the number of its groups in the batch.
        behind: By source, the number of accepted groups that wait for an unfinished group that started before them.
    """

    groups: list[Group] = field(default_factory=list)
    taken: dict[str, int] = field(default_factory=dict)
    behind: dict[str, int] = field(default_factory=dict)


def holds_up(group: Group, *, version: int, wait_age: int) -> bool:
    """Whether later groups of the source have to wait for this unfinished group.

    With wait_age 0 they always do. Otherwise they do once the group's oldest token is `wait_age` versions old. A
    younger group is carried over to a later batch and not dropped, so that no kind of response is left out.
    """
    return group.staleness(version) >= wait_age


def select(
    groups: Iterable[Group], quotas: Mapping[str, int], *, version: int, wait_age: int, max_partial: int
) -> Selection:
    """Select the first accepted groups of each source, up to its quota.

    Args:
        groups: All groups, in order of starting.
        quotas: By source, the groups in the batch.
        version: The policy version of the step.
        wait_age: See `holds_up`.
        max_partial: The largest number of samples with tokens older than `version`. A group that does not fit is left
            for a later step.
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
