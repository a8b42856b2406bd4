"""Groups: one problem and the samples that answer it, from the first submission to the batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from openmimo.core.sample_files import sample_from_dict
from openmimo.core.samples import Sample
from openmimo.rl.scheduling.problems import Problem

WAITING, RUNNING, UNSCORED, FINISHED = "waiting", "running", "unscored", "finished"


@dataclass(frozen=True)
class GroupRequest:
    """Samples to roll out now.

    Attributes:
        group_id: Names the group in `on_sample` and `on_partial`.
        source: The source of the problem.
        problem: What the stream gave.
        sample_ids: One for each sample to roll out; the caller puts it into the sample's info["sample_id"]. Where slots
            are few, a group comes in several requests.
        partials: By sample id, what an earlier rollout has written: the tokens to continue from. One with a
            finish_reason is whole and lacks its reward alone.
        temperature: At which to sample.
        max_answer_tokens: Limit of an answer, with the tokens of its partial.
        priority: Of the source; lower runs first.
        max_prompt_tokens: Samples with longer prompts come back at once, with finish_reason "too_long" (none: only
            those that leave the model no room).
        environment: Its name, for messages.
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
    """The reward of a sample that came back without one. Fields that a Sample has too have its names and meanings.

    Attributes:
        sample_id: The sample's info["sample_id"].
        domain: The source of the sample.
        group: The group of the sample.
        reward: From 0 to 1; NaN if scoring failed.
        finish_reason: "error" if scoring failed, otherwise that of the sample.
        info: What scoring adds to the sample's info: an error and its kind, or that it took too long.
    """

    sample_id: str
    domain: str
    group: str
    reward: float
    finish_reason: str
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class SampleSlot:
    """The place of one sample in its group.

    Attributes:
        id: The sample's id.
        status: waiting (to be rolled out), running, unscored (written, and its reward is not known yet) or finished.
        sample: What is written so far; None if nothing is.
        oldest_version: The oldest policy version that wrote a token of it, as far as that is known.
        retries: How often it was lost to an infrastructure error.
    """

    id: str
    status: str = WAITING
    sample: Sample | None = None
    oldest_version: int | None = None
    retries: int = 0

    def keep(self, sample: Sample, status: str) -> None:
        """Takes over what was written."""
        self.sample, self.status = sample, status
        versions = sample.written_versions()
        self.oldest_version = int(versions.min()) if len(versions) else None

    def score(self, reward: float, info: Mapping[str, Any]) -> None:
        """Gives an unscored sample its reward, in all its contexts."""
        assert self.sample is not None
        earlier = [replace(context, reward=reward) for context in self.sample.earlier]
        self.sample = replace(self.sample, reward=reward, earlier=earlier, info=self.sample.info | dict(info))
        self.status = FINISHED

    def forget(self) -> None:
        """Starts from nothing."""
        self.sample, self.status, self.oldest_version = None, WAITING, None


@dataclass
class Group:
    """One drawn problem with its samples. accepted: finished, and its rewards can be learned from."""

    id: str
    source: str
    problem: Problem
    index: int
    slots: list[SampleSlot] = field(default_factory=list)
    accepted: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether all samples and their rewards are there."""
        return all(slot.status == FINISHED for slot in self.slots)

    @property
    def num_begun(self) -> int:
        """Samples that were submitted at least once."""
        return sum(slot.status != WAITING or slot.sample is not None or slot.retries > 0 for slot in self.slots)

    @property
    def num_unscored(self) -> int:
        """Samples that await their reward."""
        return sum(slot.status == UNSCORED for slot in self.slots)

    def slot(self, sample_id: str) -> SampleSlot:
        """The place of a sample. Raises ValueError if the group has none of that id."""
        for slot in self.slots:
            if slot.id == sample_id:
                return slot
        raise ValueError(f"Group {self.id!r} has no sample {sample_id!r}; put the request's sample id into info.")

    def staleness(self, version: int) -> int:
        """How many versions older than `version` its oldest token is."""
        oldest = [slot.oldest_version for slot in self.slots if slot.oldest_version is not None]
        return max(0, version - min(oldest, default=version))

    def num_partial(self, version: int) -> int:
        """Samples with tokens older than `version`."""
        return sum(slot.oldest_version is not None and slot.oldest_version < version for slot in self.slots)

    def rewards(self) -> list[float]:
        """The rewards of a finished group."""
        return [slot.sample.reward for slot in self.slots if slot.sample is not None]

    def state(self) -> dict[str, Any]:
        """What to save for resuming: plain values and samples. The problem is read from its stream again."""
        return {
            "id": self.id,
            "source": self.source,
            "index": self.index,
            "accepted": self.accepted,
            "slots": [
                {
                    "id": slot.id,
                    "status": slot.status,
                    "sample": slot.sample,
                    "oldest_version": slot.oldest_version,
                    "retries": slot.retries,
                }
                for slot in self.slots
            ],
        }


def group_from_state(state: dict[str, Any], problem: Problem) -> Group:
    """The group that `Group.state` was called on. A sample may be the JSON that the version before saved."""
    slots = [
        SampleSlot(**values | {"sample": sample_from_dict(sample) if isinstance(sample, dict) else sample})
        for values in state["slots"]
        for sample in [values["sample"]]
    ]
    return Group(state["id"], state["source"], problem, state["index"], slots, state["accepted"])
