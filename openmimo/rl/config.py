"""What reinforcement learning may be told, without torch."""

import math
from dataclasses import dataclass
from typing import Literal

from openmimo.core.errors import ConfigError


@dataclass(frozen=True)
class SourceQuota:
    """One source of problems, and its part of every batch.

    Attributes:
        name: The name of its stream.
        quota: Its part of the groups of a batch, relative to the other quotas. Quotas that add up to
            SchedulerConfig.groups_per_step are numbers of groups.
        priority: Sources with lower numbers are submitted first, such as those whose rewards take long.
        samples_per_prompt: Answers to each problem, which make a group.
        max_prompt_tokens: Problems with longer prompts are left out (none: no limit).
        max_answer_tokens: Tokens of an answer, at most, over all the steps in which it is written.
        temperature: At which answers are sampled.
    """

    name: str
    quota: float = 1.0
    priority: int = 0
    samples_per_prompt: int = 8
    max_prompt_tokens: int | None = None
    max_answer_tokens: int = 1024
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check(
            f"SourceQuota {self.name!r}",
            self,
            {
                "name": (bool(self.name) and "/" not in self.name, "a name without '/'"),
                "quota": (0.0 < self.quota < math.inf, "above 0"),
                "samples_per_prompt": (self.samples_per_prompt >= 1, "at least 1"),
                "max_prompt_tokens": (self.max_prompt_tokens is None or self.max_prompt_tokens >= 1, "at least 1"),
                "max_answer_tokens": (self.max_answer_tokens >= 1, "at least 1"),
                "temperature": (0.0 <= self.temperature < math.inf, "0 (greedy) or more"),
            },
        )


@dataclass(frozen=True)
class SchedulerConfig:
    """What is rolled out, and what a batch is.

    Attributes:
        sources: Where problems come from.
        groups_per_step: Groups in a batch.
        seed: Decides which draws come from the easy problems.
        dynamic_sampling: Drop groups whose rewards are all equal, and draw others in their place.
        max_draws: The draws of a source in one step, at most, as a multiple of its groups in the batch. A step that
            comes to this end is content with what it has.
        margin: Submit this share more groups than are expected to be needed.
        initial_acceptance: The share of groups that is expected to be accepted before any is known.
        min_acceptance: The lowest such expectation, which bounds how many groups run at once.
        source_smoothing: Weight of the newest group in the running means of a source.
        problem_smoothing: Weight of the newest group in the running mean of a problem.
        easy_fraction: Problems that were solved in every sample are drawn with this probability only, all of them
            together (none: they stay in their stream like the others).
        remembered_problems: Problems of a source of which the pass rate is kept, at most; the longest unseen go first.
        max_sample_retries: How often a sample is rolled out again after an infrastructure error; then its group goes.
        unfinished: What happens to groups that are not finished when a batch is: "abort" drops them, and with them the
            finished groups that the batch has no room for (keeping only those would favour short answers); "partial"
            carries both over to the next step.
        max_staleness: Samples with a token that many versions older than the policy are learned from; older ones never.
        wait_age: Only with "partial": a step waits for unfinished groups that are at least this many versions old, and
            leaves younger ones for later. 0 waits for every group older than those selected; max_staleness waits only
            for those that would be too old next time.
        max_partial_fraction: Of the samples of a full batch, at most this share may have tokens older than the policy.
    """

    sources: tuple[SourceQuota, ...]
    groups_per_step: int = 32
    seed: int = 0
    dynamic_sampling: bool = True
    max_draws: float = 10.0
    margin: float = 0.1
    initial_acceptance: float = 0.5
    min_acceptance: float = 0.05
    source_smoothing: float = 0.05
    problem_smoothing: float = 0.5
    easy_fraction: float | None = 0.1
    remembered_problems: int = 100_000
    max_sample_retries: int = 2
    unfinished: Literal["abort", "partial"] = "abort"
    max_staleness: int = 4
    wait_age: int = 0
    max_partial_fraction: float = 1.0

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        carries = self.unfinished == "partial"
        rules = {
            "sources": (bool(names) and len(set(names)) == len(names), "at least one, each with a name of its own"),
            "groups_per_step": (self.groups_per_step >= 1, "at least 1"),
            "max_draws": (1.0 <= self.max_draws < math.inf, "at least 1"),
            "margin": (0.0 <= self.margin < math.inf, "0 or more"),
            "min_acceptance": (0.0 < self.min_acceptance <= 1.0, "above 0 and at most 1"),
            "initial_acceptance": (0.0 < self.initial_acceptance <= 1.0, "above 0 and at most 1"),
            "source_smoothing": (0.0 < self.source_smoothing <= 1.0, "above 0 and at most 1"),
            "problem_smoothing": (0.0 < self.problem_smoothing <= 1.0, "above 0 and at most 1"),
            "easy_fraction": (self.easy_fraction is None or 0.0 <= self.easy_fraction <= 1.0, "0 to 1, or none"),
            "remembered_problems": (self.remembered_problems >= 1, "at least 1"),
            "max_sample_retries": (self.max_sample_retries >= 0, "0 or more"),
            "unfinished": (self.unfinished in ("abort", "partial"), "abort or partial"),
            "max_staleness": (self.max_staleness >= carries, "0 or more, and at least 1 with unfinished='partial'"),
            "wait_age": (0 <= self.wait_age <= self.max_staleness * carries, "0 with 'abort'; at most max_staleness"),
            "max_partial_fraction": (0.0 < self.max_partial_fraction <= 1.0, "above 0 and at most 1"),
        }
        _check("SchedulerConfig", self, rules)
        if self.dynamic_sampling and any(source.samples_per_prompt == 1 for source in self.sources):
            raise ConfigError(
                "With samples_per_prompt=1 all rewards of a group are equal, so dynamic_sampling would drop every "
                "group; ask for more samples, or set dynamic_sampling=False."
            )


def _check(owner: str, config: object, rules: dict[str, tuple[bool, str]]) -> None:
    for name, (good, expected) in rules.items():
        if not good:
            raise ConfigError(f"{owner}: {name} is {getattr(config, name)!r}; it must be {expected}.")
