"""Groups: one problem and its samples, from the first submission to the batch; and the selection of the batch.

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
from dataclasses import dataclass, field, replace
from typing import Any

from openmimo.core.sample_files import sample_from_dict
from openmimo.core.samples import Sample
from openmimo.rl.scheduling.problems import Problem

WAITING, RUNNING, UNSCORED, FINISHED = "waiting", "running", "unscored", "finished"


@dataclass(frozen=True)
class GroupRequest:
    """Samples of a group to roll out now. A group may need several requests, if the capacity is small.

    Attributes:
        group_id: The id of the group, for `on_sample` and `on_partial`.
        source: The source of the problem.
        problem: The problem.
        sample_ids: The ids of the samples; the caller puts each into its sample's info["sample_id"].
        partials: By sample id, the sample of an earlier rollout to continue. One with a finish_reason lacks only its
            reward.
        temperature: The sampling temperature.
        max_answer_tokens: The largest number of policy-written tokens of a sample, including those of its partial.
        priority: The priority of the source; lower runs first.
        max_prompt_tokens: Samples with longer prompts end at once with finish_reason "too_long" (None: only prompts
            that fill the model's context do).
        environment: The name of the environment, for messages.
    """

    group_id: str
    source: str
    problem: Problem
    sample_ids: tuple[str, ...]
    partials: Mapping[str, Sample]
    temperature: float
    max_answer_tokens: int
    priority: int
    max_prompt_tokens: int | None = None
    environment: str = ""


@dataclass(frozen=True)
class LateReward:
    """The reward of a sample that was returned without one. Fields have the names and meanings of those of a Sample.

    Attributes:
        sample_id: The sample's info["sample_id"].
        domain: The source of the sample.
        group: The group of the sample.
        reward: From 0 to 1; NaN if scoring failed.
        finish_reason: "error" if scoring failed, otherwise that of the sample.
        info: Entries for the sample's info: an error and its kind, or a time-out.
    """

    sample_id: str
    domain: str
    group: str
    reward: float
    finish_reason: str
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class GroupMember:
    """The state of one sample of a group.

        waiting -> running -> finished
        waiting -> running -> unscored -> finished   the reward arrives later
        running or unscored -> waiting               an error or an interruption

    Attributes:
        id: The sample's id.
        status: One of the states above.
        sample: The tokens so far; None if there are none.
        oldest_version: The oldest policy version that wrote a token, as far as it is known.
        retries: How often the sample was lost to an infrastructure error.
    """

    id: str
    status: str = WAITING
    sample: Sample | None = None
    oldest_version: int | None = None
    retries: int = 0

    def keep(self, sample: Sample, status: str) -> None:
        """Store the tokens of a rollout."""
        self.sample, self.status = sample, status
        versions = sample.written_versions()
        self.oldest_version = int(versions.min()) if len(versions) else None

    def score(self, reward: float, info: Mapping[str, Any]) -> None:
        """Store the reward of an unscored sample, in all its contexts."""
        assert self.sample is not None
        earlier = [replace(context, reward=reward) for context in self.sample.earlier]
        self.sample = replace(self.sample, reward=reward, earlier=earlier, info=self.sample.info | dict(info))
        self.status = FINISHED

    def forget(self) -> None:
        """Discard the tokens."""
        self.sample, self.status, self.oldest_version = None, WAITING, None


@dataclass
class Group:
    """One drawn problem with its samples.

    Attributes:
        id: The group's id.
        source: The source of the problem.
        problem: The problem.
        index: Its index in the stream of the source.
        members: Its samples.
        accepted: All samples are finished, and the policy can learn from their rewards.
    """

    id: str
    source: str
    problem: Problem
    index: int
    members: list[GroupMember] = field(default_factory=list)
    accepted: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether all samples have their reward."""
        return all(member.status == FINISHED for member in self.members)

    @property
    def num_begun(self) -> int:
        """Samples that were submitted at least once."""
        return sum(
            member.status != WAITING or member.sample is not None or member.retries > 0 for member in self.members
        )

    @property
    def num_unscored(self) -> int:
        """Samples that await their reward."""
        return sum(member.status == UNSCORED for member in self.members)

    def member(self, sample_id: str) -> GroupMember:
        """The member of that id. Raises ValueError if the group has none."""
        for member in self.members:
            if member.id == sample_id:
                return member
        raise ValueError(f"Group {self.id!r} has no sample {sample_id!r}; put the request's sample id into info.")

    def staleness(self, version: int) -> int:
        """The age of the oldest token, in versions before `version`."""
        oldest = [member.oldest_version for member in self.members if member.oldest_version is not None]
        return max(0, version - min(oldest, default=version))

    def num_partial(self, version: int) -> int:
        """Samples with tokens older than `version`."""
        return sum(member.oldest_version is not None and member.oldest_version < version for member in self.members)

    def rewards(self) -> list[float]:
        """The rewards of a finished group."""
        return [member.sample.reward for member in self.members if member.sample is not None]

    def state(self) -> dict[str, Any]:
        """The values and samples that a checkpoint needs. The problem is read from its stream again."""
        return {
            "id": self.id,
            "source": self.source,
            "index": self.index,
            "accepted": self.accepted,
            "slots": [
                {
                    "id": member.id,
                    "status": member.status,
                    "sample": member.sample,
                    "oldest_version": member.oldest_version,
                    "retries": member.retries,
                }
                for member in self.members
            ],
        }


def group_from_state(state: dict[str, Any], problem: Problem) -> Group:
    """The group with the state of `Group.state`. A sample may be JSON, as an earlier version saved it."""
    members = [
        GroupMember(**values | {"sample": sample_from_dict(sample) if isinstance(sample, dict) else sample})
        for values in state["slots"]
        for sample in [values["sample"]]
    ]
    return Group(state["id"], state["source"], problem, state["index"], members, state["accepted"])


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
