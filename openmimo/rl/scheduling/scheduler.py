"""The data scheduler: decides what to roll out next, and what a training batch is.

It runs nothing itself. A loop asks it what to submit, tells it what came back, and takes the batch when it is complete:

    scheduler.begin_step(version)
    while not scheduler.is_complete():
        submit(scheduler.next_submissions(num_free_slots))     # and stop what take_cancelled() lists
        if anything_runs():                                    # else the step is complete now
            ...                                                # on_sample, on_reward as things come back
    ...                                                        # on_partial for what was interrupted
    batch, report = scheduler.take_batch()

Continuous rollout, submissions by expected acceptance, and early termination in the order of starting are those of
MiMo-7B (section 3.4); quotas, priorities and partial rollouts those of MiMo-V2-Flash (section 4.6.2). Decisions depend
on the seed and on the order of the calls only, and the whole state can be saved between any two calls.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.samples import Sample
from openmimo.rl.config import SchedulerConfig
from openmimo.rl.scheduling.early_stop import Selection, select
from openmimo.rl.scheduling.groups import (
    FINISHED,
    RUNNING,
    UNSCORED,
    WAITING,
    Group,
    GroupRequest,
    LateReward,
    SampleSlot,
    group_from_state,
)
from openmimo.rl.scheduling.problems import Problem, ProblemSource

_EQUAL_REWARDS = 1e-6
_WASTED = ("dropped_stale", "dropped_error", "surplus", "aborted")
_COUNTED = (
    "drawn", "drawn_easy", "carried_in", "accepted", "dropped_easy", "dropped_hard", "dropped_equal",
    "dropped_too_long", *_WASTED, "scored", "errors", "late",
)  # fmt: skip


class DataScheduler:
    """What to roll out, and what a batch is.

    streams: for each source of the config, a function from an index (0, 1, ...) to a problem, always the same one; a
    finite set goes round and round. Raises ConfigError if sources and streams do not have the same names.
    """

    def __init__(self, config: SchedulerConfig, streams: Mapping[str, Callable[[int], Problem]]):
        self._quotas = {quota.name: quota for quota in config.sources}
        if set(self._quotas) != set(streams):
            raise ConfigError(f"The sources are {sorted(self._quotas)}, but the streams are {sorted(streams)}.")
        self._config = config
        self._sources = {name: ProblemSource(name, streams[name], config) for name in self._quotas}
        self._groups: dict[str, Group] = {}  # in the order of starting; only those that may still be learned from
        self._num_started = 0
        self._version = 0
        self._step_is_open = False
        self._credits = dict.fromkeys(self._quotas, 0.0)
        self._step_quotas = dict.fromkeys(self._quotas, 0)
        self._draws_left = dict.fromkeys(self._quotas, 0)
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in self._quotas}
        self._cancelled: list[str] = []

    def begin_step(self, version: int) -> None:
        """Begins a batch for policy `version`. Groups carried over that have become too old are dropped.

        Raises RuntimeError while a step is open, and ValueError if versions go backwards.
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

    def next_submissions(self, num_free_slots: int) -> list[GroupRequest]:
        """What to roll out now: at most `num_free_slots` samples, first those of groups that were begun.

        New groups are as many as should be needed, if the share that was accepted of late goes on.
        """
        self._require_open_step()
        if num_free_slots <= 0:
            return []
        selection = self._select()
        requests: list[GroupRequest] = []
        for group in self._groups.values():
            is_needed = selection.taken[group.source] < self._step_quotas[group.source]
            if is_needed or self._config.unfinished == "partial":
                num_free_slots -= self._submit(group, num_free_slots, requests)
        wanted = {name: self._num_wanted(name, selection) for name in self._quotas}
        while num_free_slots > 0 and (name := self._most_wanting(wanted)) is not None:
            group = self._start_group(name)
            if group is None:
                wanted[name] = 0
                continue
            wanted[name] -= 1
            num_free_slots -= self._submit(group, num_free_slots, requests)
        return requests

    def on_sample(self, group_id: str, sample: Sample) -> None:
        """Takes a sample that came to its end; its info["sample_id"] says which of the request's it is.

        finish_reason "error" (infrastructure failed; not: the policy ran out of time) rolls it out again, from its
        partial if it has one. "too_long" drops the group. A reward of NaN means that `on_reward` follows, in this step
        or a later one. Samples of groups that have ended meanwhile are counted and left. Raises ValueError for samples
        that are not being rolled out, or have an infinite reward.
        """
        if sample.finish_reason in ("", "abort"):
            raise ValueError(f"A sample of group {group_id!r} has not come to its end; give it to on_partial.")
        found = self._running(group_id, sample)
        if found is None:
            return
        group, slot = found
        if sample.finish_reason == "error":
            self._lose(group, slot)
            return
        if sample.finish_reason == "too_long":
            self._end(group, "dropped_too_long")
            return
        if math.isinf(sample.reward):
            raise ValueError(f"Sample {slot.id!r} has the reward {sample.reward}; a reward is finite.")
        sample.group = group_id
        slot.keep(sample, UNSCORED if math.isnan(sample.reward) else FINISHED)
        self._counts[group.source]["scored"] += slot.status == FINISHED
        self._settle(group)

    def on_reward(self, late: LateReward) -> None:
        """Takes the reward of a sample that came without one.

        After a failure the sample waits to be scored again, or its group ends. Rewards for groups that have ended
        meanwhile are counted and left. Raises ValueError if no reward of that sample is awaited.
        """
        group = self._find(late.group)
        if group is None:
            return
        slot = group.slot(late.sample_id)
        if slot.status != UNSCORED or slot.sample is None:
            raise ValueError(f"Sample {slot.id!r} is {slot.status}; no reward of it is awaited.")
        if late.finish_reason == "error":
            self._lose(group, slot)
            return
        slot.score(late.reward, late.info)
        self._counts[group.source]["scored"] += 1
        self._settle(group)

    def on_partial(self, group_id: str, sample: Sample) -> None:
        """Takes what is written of a sample whose rollout was interrupted; a later request continues from there.

        Samples that keep running from one step to the next need no such call. Raises ValueError as on_sample.
        """
        found = self._running(group_id, sample)
        if found is None:
            return
        slot = found[1]
        if any(sample.loss_mask):
            sample.group = group_id
            slot.keep(sample, WAITING)
        else:
            slot.forget()

    def is_complete(self) -> bool:
        """Whether the batch can be taken: each source is full, or has come to its last draw with nothing running."""
        self._require_open_step()
        return self._is_complete(self._select())

    def take_batch(self) -> tuple[list[list[Sample]], dict[str, float]]:
        """Ends the step: its groups in the order in which they started, and its report.

        The scheduler forgets these groups: a state saved from now on does not have them. Unfinished groups and surplus
        are dropped or carried over, as configured. Raises RuntimeError if the step is not complete.
        """
        self._require_open_step()
        selection = self._select()
        if not self._is_complete(selection):
            raise RuntimeError("The batch is not complete; go on until is_complete().")
        for group in selection.groups:
            del self._groups[group.id]
            self._counts[group.source]["accepted"] += 1
            self._counts[group.source]["samples_used"] += len(group.slots)
        if self._config.unfinished == "abort":
            for group in list(self._groups.values()):
                self._end(group, "surplus" if group.accepted else "aborted")
        self._step_is_open = False
        batch = [[slot.sample for slot in group.slots if slot.sample is not None] for group in selection.groups]
        report = self.report() | self._batch_report(selection.groups)
        for name, counts in self._counts.items():
            counts.clear()
            counts["carried_in"] = sum(group.source == name for group in self._groups.values())
        return batch, report

    def take_cancelled(self) -> list[str]:
        """Samples, running or awaiting their reward, that are no longer wanted since the last call."""
        cancelled, self._cancelled = self._cancelled, []
        return cancelled

    def in_flight(self) -> list[GroupRequest]:
        """What was submitted and is not scored; after load_state, the loop submits it again.

        A sample that awaits its reward is a partial of its request: with a finish_reason, and only to be scored.
        """
        requests = []
        for group in self._groups.values():
            running = [slot for slot in group.slots if slot.status in (RUNNING, UNSCORED)]
            if running:
                requests.append(self._request(group, running))
        return requests

    def report(self) -> dict[str, float]:
        """Counters of this step, in groups if not said otherwise, and means of all time; `source/...` for one source.

        carried_in + drawn = accepted + dropped_* + surplus + aborted + in_flight. scored, errors (lost to failures of
        the infrastructure) and late count samples; late ones came after their group had ended. short: by how many
        groups the batch is smaller than it should be.
        in_flight: unfinished, and finished but not taken. unscored: samples that await their reward.
        waste_share: of the samples that were ended in this step and not dropped by dynamic sampling, how many are never
        learned from. known_problems, never_solved_share, passed_over (by source): problems whose pass rate is known,
        how many of these have pass rate 0, and how many draws stepped over a problem for its pass rate, of all time.
        """
        totals: Counter[str] = Counter()
        report: dict[str, float] = {}
        taken = self._select().taken if self._step_is_open else dict.fromkeys(self._quotas, 0)
        for name, source in self._sources.items():
            counts = self._counts[name]
            values = {key: counts[key] for key in _COUNTED} | {"quota": self._step_quotas[name]}
            values["accepted"] += taken[name]
            values["short"] = values["quota"] - values["accepted"]
            values["in_flight"] = sum(group.source == name for group in self._groups.values()) - taken[name]
            values["unscored"] = sum(group.num_unscored for group in self._groups.values() if group.source == name)
            totals.update(values | {key: counts[key] for key in ("samples_used", "samples_wasted")})
            report |= {f"{name}/{key}": value for key, value in values.items()}
            report |= {f"{name}/acceptance": source.acceptance, f"{name}/easy_pool": source.num_easy}
            report |= {
                f"{name}/known_problems": source.num_known,
                f"{name}/never_solved_share": source.share_never_solved,
                f"{name}/passed_over": source.num_passed_over,
            }
            if source.pass_rate is not None:
                report[f"{name}/pass_rate"] = source.pass_rate
        used, wasted = totals.pop("samples_used"), totals.pop("samples_wasted")
        return {"version": self._version, **totals, "waste_share": wasted / max(1, used + wasted), **report}

    def state(self) -> dict[str, Any]:
        """Everything needed to resume: plain values, and the samples that were accepted and not taken."""
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
        """Goes on from what `state` gave, as if nothing had been in between; see in_flight.

        Raises CheckpointError if the state is that of another seed or of other sources.
        """
        for key, ours in (("seed", self._config.seed), ("source_names", list(self._quotas))):
            if state.get(key) != ours:
                raise CheckpointError(
                    f"The saved scheduler state has {key} {state.get(key)!r}, but this run has {ours!r}. Resume with "
                    f"the same {key}, or start anew."
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
        """Whole groups for each source; what a share has over or under is made up for in later steps."""
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

    def _num_wanted(self, name: str, selection: Selection) -> int:
        """How many new groups a source should start: those that run and these should just fill its quota."""
        need = self._step_quotas[name] - selection.taken[name] - selection.behind[name]
        expected = self._sources[name].expected_acceptance
        target = math.ceil(need / expected * (1.0 + self._config.margin))
        return max(0, min(target - self._num_unfinished(name), self._draws_left[name]))

    def _most_wanting(self, wanted: Mapping[str, int]) -> str | None:
        """The source to start a group of: by priority, then the one that lacks the largest share of its quota."""
        names = [name for name, count in wanted.items() if count > 0]
        rank = {name: (self._quotas[name].priority, -wanted[name] / self._step_quotas[name]) for name in names}
        return min(names, key=rank.__getitem__, default=None)

    def _start_group(self, name: str) -> Group | None:
        """Draws a problem; None if the draws of the step are used up."""
        quota, counts = self._quotas[name], self._counts[name]
        if self._draws_left[name] == 0:
            return None
        self._draws_left[name] -= 1
        problem, index, easy = self._sources[name].draw()
        counts["drawn"] += 1
        counts["drawn_easy"] += easy
        group = Group(f"{name}/{self._num_started}", name, problem, index)
        group.slots = [SampleSlot(f"{group.id}/{number}") for number in range(quota.samples_per_prompt)]
        self._num_started += 1
        self._groups[group.id] = group
        return group

    def _submit(self, group: Group, num_free_slots: int, requests: list[GroupRequest]) -> int:
        """Requests as many waiting samples of a group as there are slots for; returns how many."""
        slots = [slot for slot in group.slots if slot.status == WAITING][:num_free_slots]
        for slot in slots:
            slot.status = RUNNING
            if slot.oldest_version is None:
                slot.oldest_version = self._version  # no token of it can be older
        if slots:
            requests.append(self._request(group, slots))
        return len(slots)

    def _request(self, group: Group, slots: list[SampleSlot]) -> GroupRequest:
        quota = self._quotas[group.source]
        return GroupRequest(
            group_id=group.id,
            source=group.source,
            problem=group.problem,
            sample_ids=tuple(slot.id for slot in slots),
            partials={slot.id: slot.sample for slot in slots if slot.sample is not None},
            temperature=quota.temperature,
            max_answer_tokens=quota.max_answer_tokens,
            priority=quota.priority,
            max_prompt_tokens=quota.max_prompt_tokens,
            environment=quota.environment,
        )

    def _find(self, group_id: str) -> Group | None:
        """The group; None, and counted, if it has ended. Raises ValueError if there never was one."""
        group = self._groups.get(group_id)
        if group is None:
            name, _, number = group_id.rpartition("/")
            if name not in self._quotas or not number.isdecimal() or int(number) >= self._num_started:
                raise ValueError(f"There is no group {group_id!r}; use the ids of the requests.")
            self._counts[name]["late"] += 1
        return group

    def _running(self, group_id: str, sample: Sample) -> tuple[Group, SampleSlot] | None:
        group = self._find(group_id)
        if group is None:
            return None
        slot = group.slot(sample.info.get("sample_id", ""))
        if slot.status not in (RUNNING, UNSCORED):
            raise ValueError(f"Sample {slot.id!r} came back, but it is {slot.status}, not running.")
        return group, slot

    def _lose(self, group: Group, slot: SampleSlot) -> None:
        """After an infrastructure error: the sample waits to be rolled out again, or its group ends."""
        self._counts[group.source]["errors"] += 1
        slot.retries += 1
        slot.status = WAITING
        if slot.sample is None:
            slot.forget()
        if slot.retries > self._config.max_sample_retries:
            self._end(group, "dropped_error")

    def _settle(self, group: Group) -> None:
        """Once all samples of a group are scored: accepts it, or drops it."""
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
        """Forgets a group that will not be learned from, and counts why."""
        del self._groups[group.id]
        counts = self._counts[group.source]
        counts[reason] += 1
        if reason in _WASTED:
            counts["samples_wasted"] += group.num_begun
        self._cancelled += [slot.id for slot in group.slots if slot.status in (RUNNING, UNSCORED)]

    def _batch_report(self, groups: list[Group]) -> dict[str, float]:
        """How old the batch is: its share of partial samples, and the share of its tokens at each staleness."""
        ages: Counter[int] = Counter()
        for group in groups:
            for slot in group.slots:
                versions, counts = np.unique(slot.sample.written_versions(), return_counts=True)
                ages.update(dict(zip((self._version - versions).tolist(), counts.tolist(), strict=True)))
        num_samples = sum(len(group.slots) for group in groups)
        num_partial = sum(group.num_partial(self._version) for group in groups)
        histogram = {f"staleness/{age}": count / ages.total() for age, count in sorted(ages.items())}
        return {"partial_share": num_partial / max(1, num_samples), **histogram}
