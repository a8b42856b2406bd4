"""The data scheduler: decides which samples to roll out next, and which groups are a training batch.

It runs nothing itself. A loop submits its requests, passes results to it, and takes the batch when it is complete:

    scheduler.begin_step(version)
    while not scheduler.is_complete():
        submit(scheduler.next_submissions(max_samples))        # and stop the samples of take_cancelled()
        if anything_runs():                                    # otherwise the step is complete now
            ...                                                # on_sample, on_reward with the results
    ...                                                        # on_partial for interrupted samples
    batch, report = scheduler.take_batch()

Continuous rollout, submissions by expected acceptance, and early termination in the order of starting are those of
MiMo-7B (section 3.4); quotas, priorities and partial rollouts those of MiMo-V2-Flash (section 4.6.2). Decisions depend
only on the seed and on the order of the calls, and the whole state can be saved between any two calls.

How many groups of a source to start: its quota, less the groups that the batch has and those that are accepted but wait
for an earlier one, divided by the recent share of accepted groups, plus a margin; unfinished groups count towards it.
Sources with a higher priority start first, then the source that lacks the largest share of its quota. Which groups are
the batch is decided by `groups.select`.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.samples import Sample
from openmimo.rl.config import SchedulerConfig
from openmimo.rl.scheduling.groups import (
    FINISHED,
    RUNNING,
    UNSCORED,
    WAITING,
    Group,
    GroupMember,
    GroupRequest,
    LateReward,
    Selection,
    group_from_state,
    select,
)
from openmimo.rl.scheduling.problems import Problem, ProblemSource
from openmimo.rl.scheduling.step_report import WASTED, batch_report, step_report

_EQUAL_REWARDS = 1e-6


class DataScheduler:
    """Decides which samples to roll out, and which groups are a batch."""

    def __init__(self, config: SchedulerConfig, streams: Mapping[str, Callable[[int], Problem]]):
        """
        Args:
            config: Sources, quotas and limits.
            streams: By source, a function from an index (0, 1, ...) to a problem, always the same one. The stream of a
                finite set repeats.

        Raises:
            ConfigError: Sources and streams do not have the same names.
        """
        self._quotas = {quota.name: quota for quota in config.sources}
        if set(self._quotas) != set(streams):
            raise ConfigError(f"The sources are {sorted(self._quotas)}, but the streams are {sorted(streams)}.")
        self._config = config
        self._sources = {name: ProblemSource(name, streams[name], config) for name in self._quotas}
        self._groups: dict[str, Group] = {}  # in order of starting, without those that ended
        self._num_started = 0
        self._version = 0
        self._step_is_open = False
        self._credits = dict.fromkeys(self._quotas, 0.0)
        self._step_quotas = dict.fromkeys(self._quotas, 0)
        self._draws_left = dict.fromkeys(self._quotas, 0)
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in self._quotas}
        self._cancelled: list[str] = []

    def begin_step(self, version: int) -> None:
        """Begin a batch for policy `version`. Groups of earlier steps that are now too old are dropped.

        Raises:
            RuntimeError: A step is open.
            ValueError: The version is older than that of the step before.
        """
        if self._step_is_open:
            raise RuntimeError("A step is open; take its batch before the next one begins.")
        if version < self._version:
            raise ValueError(f"Policy version {version} is older than that of the step before, {self._version}.")
        self._version = version
        self._step_is_open = True
        for group in list(self._groups.values()):
            if self._is_stale(group):
                self._end(group, "dropped_stale")
        self._divide_quotas()
        for name, quota in self._step_quotas.items():
            self._draws_left[name] = math.ceil(self._config.max_draws * quota)

    def next_submissions(self, max_samples: int) -> list[GroupRequest]:
        """Requests for at most `max_samples` samples; first those of started groups, then those of new groups.

        Starts enough new groups to fill the batch at the recent acceptance rate.
        """
        self._require_open_step()
        if max_samples <= 0:
            return []
        selection = self._select()
        requests: list[GroupRequest] = []
        for group in self._groups.values():
            is_needed = selection.taken[group.source] < self._step_quotas[group.source]
            if is_needed or self._config.unfinished == "partial":
                max_samples -= self._submit(group, max_samples, requests)
        num_new = {name: self._num_new_groups(name, selection) for name in self._quotas}
        while max_samples > 0 and (name := self._next_source(num_new)) is not None:
            new_group = self._start_group(name)
            if new_group is None:
                num_new[name] = 0
                continue
            num_new[name] -= 1
            max_samples -= self._submit(new_group, max_samples, requests)
        return requests

    def on_sample(self, group_id: str, sample: Sample) -> None:
        """Take a sample that has ended. Samples of groups that ended before are only counted.

        Args:
            group_id: The group of the request.
            sample: The sample, with the id of the request in info["sample_id"]. finish_reason "error" (a failure of the
                infrastructure) rolls it out again, from its partial if it has one; "too_long" drops the group. A reward
                of NaN means that `on_reward` follows, in this step or a later one.

        Raises:
            ValueError: The sample has not ended, was not requested, or has an infinite reward.
        """
        if sample.finish_reason in ("", "abort"):
            raise ValueError(f"A sample of group {group_id!r} has not ended; pass it to on_partial.")
        found = self._running(group_id, sample)
        if found is None:
            return
        group, member = found
        if sample.finish_reason == "error":
            self._lose(group, member)
            return
        if sample.finish_reason == "too_long":
            self._end(group, "dropped_too_long")
            return
        if math.isinf(sample.reward):
            raise ValueError(f"Sample {member.id!r} has the reward {sample.reward}; a reward is finite.")
        sample.group = group_id
        member.keep(sample, UNSCORED if math.isnan(sample.reward) else FINISHED)
        self._counts[group.source]["scored"] += member.status == FINISHED
        self._settle(group)

    def on_reward(self, late: LateReward) -> None:
        """Take the reward of a sample that was returned without one. Rewards of groups that ended are only counted.

        After a failure the sample is scored again, or its group ends.

        Raises:
            ValueError: The sample does not wait for a reward.
        """
        group = self._find(late.group)
        if group is None:
            return
        member = group.member(late.sample_id)
        if member.status != UNSCORED or member.sample is None:
            raise ValueError(f"Sample {member.id!r} is {member.status}; it does not wait for a reward.")
        if late.finish_reason == "error":
            self._lose(group, member)
            return
        member.score(late.reward, late.info)
        self._counts[group.source]["scored"] += 1
        self._settle(group)

    def on_partial(self, group_id: str, sample: Sample) -> None:
        """Take the tokens of an interrupted sample, which a later request continues.

        Samples that keep running from one step to the next need no such call.

        Raises:
            ValueError: The sample was not requested.
        """
        found = self._running(group_id, sample)
        if found is None:
            return
        member = found[1]
        if any(sample.loss_mask):
            sample.group = group_id
            member.keep(sample, WAITING)
        else:
            member.forget()

    def is_complete(self) -> bool:
        """Whether the batch can be taken: each source has its quota, or no draws left and no group unfinished."""
        self._require_open_step()
        return self._is_complete(self._select())

    def take_batch(self) -> tuple[list[list[Sample]], dict[str, float]]:
        """End the step. Unfinished and surplus groups are dropped or carried over, as configured.

        Returns:
            The samples of each group, in order of starting, and the report of the step. The state of the scheduler does
            not contain these groups any more.

        Raises:
            RuntimeError: The step is not complete.
        """
        self._require_open_step()
        selection = self._select()
        if not self._is_complete(selection):
            raise RuntimeError("The batch is not complete; continue until is_complete().")
        for group in selection.groups:
            del self._groups[group.id]
            self._counts[group.source]["accepted"] += 1
            self._counts[group.source]["samples_used"] += len(group.members)
        if self._config.unfinished == "abort":
            for group in list(self._groups.values()):
                self._end(group, "surplus" if group.accepted else "aborted")
        self._step_is_open = False
        batch = [[member.sample for member in group.members if member.sample is not None] for group in selection.groups]
        report = self.report() | batch_report(selection.groups, self._version)
        for name, counts in self._counts.items():
            counts.clear()
            counts["carried_in"] = sum(group.source == name for group in self._groups.values())
        return batch, report

    def take_cancelled(self) -> list[str]:
        """The running or unscored samples that have become superfluous since the last call."""
        cancelled, self._cancelled = self._cancelled, []
        return cancelled

    def in_flight(self) -> list[GroupRequest]:
        """Requests for all samples without a reward, which the loop submits again after load_state.

        An unscored sample is a partial with a finish_reason: it only has to be scored.
        """
        requests = []
        for group in self._groups.values():
            running = [member for member in group.members if member.status in (RUNNING, UNSCORED)]
            if running:
                requests.append(self._request(group, running))
        return requests

    def report(self) -> dict[str, float]:
        """Counters of this step and means over the run, over all sources and as `source/...` for each.

        In groups, carried_in + drawn = accepted + dropped_* + surplus + aborted + in_flight:

        - quota, short: the groups of a full batch, and how many are missing.
        - in_flight: unfinished groups, and finished ones that are not in the batch.

        In samples:

        - scored, unscored: with a reward of this step, and without one yet.
        - errors: lost to failures of the infrastructure.
        - late: returned after their group had ended.
        - waste_share: the share that is never learned from, among the samples that ended in this step and were not
          dropped by dynamic sampling.

        By source, over the run: see `ProblemSource.means`.
        """
        taken = self._select().taken if self._step_is_open else dict.fromkeys(self._quotas, 0)
        return step_report(
            self._version,
            self._sources,
            counts=self._counts,
            quotas=self._step_quotas,
            taken=taken,
            groups=self._groups.values(),
        )

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint: plain values, and the samples of all groups that the batch may still take."""
        return {
            "seed": self._config.seed,
            "source_names": list(self._quotas),
            "num_started": self._num_started,
            "version": self._version,
            "step_is_open": self._step_is_open,
            "credits": dict(self._credits),
            "step_quotas": dict(self._step_quotas),
            "draws_left": dict(self._draws_left),
            "counts": {name: dict(counts) for name, counts in self._counts.items()},
            "cancelled": list(self._cancelled),
            "sources": {name: source.state() for name, source in self._sources.items()},
            "groups": [group.state() for group in self._groups.values()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a result of `state`; see `in_flight`.

        Raises:
            CheckpointError: The state is of another seed or other sources.
        """
        for key, expected in (("seed", self._config.seed), ("source_names", list(self._quotas))):
            if state.get(key) != expected:
                raise CheckpointError(
                    f"The saved scheduler state has {key} {state.get(key)!r}, but this run has {expected!r}. Resume "
                    f"with the same {key}, or start a new run."
                )
        self._num_started = state["num_started"]
        self._version = state["version"]
        self._step_is_open = state["step_is_open"]
        self._credits = dict(state["credits"])
        self._step_quotas = dict(state["step_quotas"])
        self._draws_left = dict(state["draws_left"])
        self._counts = {name: Counter(counts) for name, counts in state["counts"].items()}
        self._cancelled = list(state["cancelled"])
        for name, source in self._sources.items():
            source.load_state(state["sources"][name])
        self._groups = {}
        for saved in state["groups"]:
            problem = self._sources[saved["source"]].problem(saved["index"])
            self._groups[saved["id"]] = group_from_state(saved, problem)

    def _require_open_step(self) -> None:
        if not self._step_is_open:
            raise RuntimeError("No step is open; call begin_step first.")

    def _divide_quotas(self) -> None:
        """Divide the batch into whole groups of each source. Credits carry the remainders over to later steps."""
        total = sum(quota.quota for quota in self._quotas.values())
        for name, quota in self._quotas.items():
            self._credits[name] += self._config.groups_per_step * quota.quota / total
        self._step_quotas = dict.fromkeys(self._quotas, 0)
        for _ in range(self._config.groups_per_step):
            name = max(self._credits, key=self._credits.__getitem__)
            self._credits[name] -= 1.0
            self._step_quotas[name] += 1

    def _select(self) -> Selection:
        planned = sum(self._quotas[name].samples_per_prompt * count for name, count in self._step_quotas.items())
        return select(
            self._groups.values(),
            self._step_quotas,
            version=self._version,
            wait_age=self._config.effective_wait_age,
            max_partial=int(self._config.max_partial_fraction * planned),
        )

    def _is_complete(self, selection: Selection) -> bool:
        return all(
            selection.taken[name] == quota or (self._draws_left[name] == 0 and self._num_unfinished(name) == 0)
            for name, quota in self._step_quotas.items()
        )

    def _num_unfinished(self, name: str) -> int:
        return sum(group.source == name and not group.accepted for group in self._groups.values())

    def _num_new_groups(self, name: str, selection: Selection) -> int:
        """How many new groups a source should start, so that they and the unfinished ones just fill its quota."""
        need = self._step_quotas[name] - selection.taken[name] - selection.behind[name]
        expected = self._sources[name].expected_acceptance
        target = math.ceil(need / expected * (1.0 + self._config.margin))
        return max(0, min(target - self._num_unfinished(name), self._draws_left[name]))

    def _next_source(self, num_new: Mapping[str, int]) -> str | None:
        """The source that starts a group next: by priority, then by the missing share of its quota."""
        names = [name for name, count in num_new.items() if count > 0]
        sort_key = {name: (self._quotas[name].priority, -num_new[name] / self._step_quotas[name]) for name in names}
        return min(names, key=sort_key.__getitem__, default=None)

    def _start_group(self, name: str) -> Group | None:
        """Start a group with the next problem. None if the source has no draws left in this step."""
        quota, counts = self._quotas[name], self._counts[name]
        if self._draws_left[name] == 0:
            return None
        self._draws_left[name] -= 1
        problem, index, easy = self._sources[name].draw()
        counts["drawn"] += 1
        counts["drawn_easy"] += easy
        group = Group(f"{name}/{self._num_started}", name, problem, index)
        group.members = [GroupMember(f"{group.id}/{number}") for number in range(quota.samples_per_prompt)]
        self._num_started += 1
        self._groups[group.id] = group
        return group

    def _submit(self, group: Group, max_samples: int, requests: list[GroupRequest]) -> int:
        """Append a request for at most `max_samples` waiting samples of a group. Returns their number."""
        members = [member for member in group.members if member.status == WAITING][:max_samples]
        for member in members:
            member.status = RUNNING
            if member.oldest_version is None:
                member.oldest_version = self._version  # no token can be older
        if members:
            requests.append(self._request(group, members))
        return len(members)

    def _request(self, group: Group, members: list[GroupMember]) -> GroupRequest:
        quota = self._quotas[group.source]
        return GroupRequest(
            group_id=group.id,
            source=group.source,
            problem=group.problem,
            sample_ids=tuple(member.id for member in members),
            partials={member.id: member.sample for member in members if member.sample is not None},
            temperature=quota.temperature,
            max_answer_tokens=quota.max_answer_tokens,
            priority=quota.priority,
            max_prompt_tokens=quota.max_prompt_tokens,
            environment=quota.environment,
        )

    def _find(self, group_id: str) -> Group | None:
        """The group. None, and counted as late, if it has ended. Raises ValueError for an id that never existed."""
        group = self._groups.get(group_id)
        if group is None:
            name, _, number = group_id.rpartition("/")
            if name not in self._quotas or not number.isdecimal() or int(number) >= self._num_started:
                raise ValueError(f"There is no group {group_id!r}; use the ids of the requests.")
            self._counts[name]["late"] += 1
        return group

    def _running(self, group_id: str, sample: Sample) -> tuple[Group, GroupMember] | None:
        group = self._find(group_id)
        if group is None:
            return None
        member = group.member(sample.info.get("sample_id", ""))
        if member.status not in (RUNNING, UNSCORED):
            raise ValueError(f"Sample {member.id!r} was returned, but it is {member.status}, not running.")
        return group, member

    def _lose(self, group: Group, member: GroupMember) -> None:
        """After a failure of the infrastructure: roll the sample out again, or end its group."""
        self._counts[group.source]["errors"] += 1
        member.retries += 1
        member.status = WAITING
        if member.sample is None:
            member.forget()
        if member.retries > self._config.max_sample_retries:
            self._end(group, "dropped_error")

    def _settle(self, group: Group) -> None:
        """Accept or drop a group whose samples all have their reward."""
        if not group.is_finished:
            return
        if self._is_stale(group):
            self._end(group, "dropped_stale")
            return
        rewards = group.rewards()
        low, high, mean = min(rewards), max(rewards), sum(rewards) / len(rewards)
        group.accepted = not self._config.dynamic_sampling or high - low > _EQUAL_REWARDS
        source = self._sources[group.source]
        source.record(group.problem.id, index=group.index, reward=mean, accepted=group.accepted)
        if not group.accepted:
            is_easy, is_hard = low >= 1.0 - _EQUAL_REWARDS, high <= _EQUAL_REWARDS
            self._end(group, "dropped_easy" if is_easy else "dropped_hard" if is_hard else "dropped_equal")

    def _is_stale(self, group: Group) -> bool:
        return group.staleness(self._version) > self._config.max_staleness

    def _end(self, group: Group, reason: str) -> None:
        """Remove a group that no batch will have, and count the reason."""
        del self._groups[group.id]
        counts = self._counts[group.source]
        counts[reason] += 1
        if reason in WASTED:
            counts["samples_wasted"] += group.num_begun
        self._cancelled += [member.id for member in group.members if member.status in (RUNNING, UNSCORED)]
