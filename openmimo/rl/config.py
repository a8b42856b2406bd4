"""What reinforcement learning may be told, without torch."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from openmimo.core.errors import ConfigError
from openmimo.engine.config import EngineConfig
from openmimo.train.config import CheckpointConfig, OptimiserConfig


def _check(owner: str, config: object, rules: dict[str, tuple[bool, str]]) -> None:
    for name, (good, expected) in rules.items():
        if not good:
            raise ConfigError(f"{owner}: {name} is {getattr(config, name)!r}; it must be {expected}.")


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


@dataclass(frozen=True)
class RlSource(SourceQuota):
    """One source of a run: an environment with its settings, and its part of every batch.

    Attributes:
        environment: A file in `openmimo/rl/environments`, or `package.module:Object`.
        options: Settings of that environment (its `options` dataclass lists them).
    """

    environment: str = "task"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RlEvaluation:
    """Held-out problems.

    Attributes:
        every_steps: Steps between two; there is one before the first step and one after the last, too.
        problems: Of each source.
        temperature: 0 answers greedily; 1 measures the policy that is trained.
    """

    every_steps: int = 50
    problems: int = 100
    temperature: float = 0.0

    def __post_init__(self) -> None:
        _check(
            "evaluation", self, {name: (getattr(self, name) >= 1, "at least 1") for name in ("every_steps", "problems")}
        )


@dataclass(frozen=True)
class RlConfig:
    """A complete run of reinforcement learning, from a checkpoint to a better one.

    Attributes:
        checkpoint: The model folder to start from.
        run_folder: Where everything goes; a run that finds its own checkpoints there goes on from the newest.
        sources: Where problems come from; the name of a source is its domain.
        steps: Batches to learn from.
        algorithm: A file in `openmimo/rl/algorithms`, or `package.module:Object`.
        algorithm_options: Settings of that algorithm (its `options` dataclass lists them).
        groups_per_step: Prompts of a batch.
        updates_per_step: Optimiser steps on each batch, over its groups in as many parts.
        learning_rate: After the warm-up.
        end_learning_rate: To which it falls along a cosine until the last step (none: it stays).
        warmup_steps: Steps in which it rises linearly.
        dynamic_sampling: Draw other problems in place of those whose samples all have the same reward.
        max_draws: How many problems a step may draw, at most, as a multiple of its groups.
        easy_fraction: Problems that were solved every time are drawn with this probability only (none: like others).
        unfinished: What happens to samples that are not finished when a batch is: abort, or partial (they go on).
        max_staleness: Tokens so many policy versions old are learned from; older ones never.
        replay_routing: Route in training as the engine routed (R3).
        bias_rate: Step of the experts' selection bias.
        mtp_weight: Weight of the MTP heads' own loss, which moves nothing but the heads.
        max_running: Samples in the engine at once.
        rollouts: Who samples: engine (in this process, in turns with the trainer), processes (workers of this machine),
            or ray (actors of a cluster). Workers have a copy of the policy, and with unfinished "partial" they begin
            the next batch while the trainer learns from this one.
        rollout_workers: How many; only with processes and ray.
        tokens_per_microbatch: Packed tokens in memory at once.
        reward_threads: Threads in which slow environments answer.
        seed: Decides problems and samples.
        device: auto (an accelerator if there is one), cpu, or a device of torch.
        dtype: Of the activations, in training and in the engine: float32, bfloat16 or auto.
        threads: CPU threads of torch (0: as torch chooses).
        tensorboard: Write event files to `<run_folder>/tensorboard` too.
        engine: Cache and drafting of the rollouts.
        optimiser: AdamW and gradient clipping.
        checkpoints: When they are written, which are kept.
        evaluation: Held-out problems.
    """

    checkpoint: str
    run_folder: str
    sources: tuple[RlSource, ...]
    steps: int = 200
    algorithm: str = "grpo"
    algorithm_options: dict[str, Any] = field(default_factory=dict)
    groups_per_step: int = 16
    updates_per_step: int = 1
    learning_rate: float = 1e-6
    end_learning_rate: float | None = None
    warmup_steps: int = 0
    dynamic_sampling: bool = True
    max_draws: float = 4.0
    easy_fraction: float | None = 0.1
    unfinished: Literal["abort", "partial"] = "abort"
    max_staleness: int = 4
    replay_routing: bool = True
    bias_rate: float = 0.0
    mtp_weight: float = 0.1
    max_running: int = 128
    rollouts: Literal["engine", "processes", "ray"] = "engine"
    rollout_workers: int = 1
    tokens_per_microbatch: int = 8192
    reward_threads: int = 4
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    tensorboard: bool = False
    engine: EngineConfig = EngineConfig(
        max_sequences=128, prefill_tokens=4096, mixed_prefill_tokens=1024, speculative=False
    )
    optimiser: OptimiserConfig = OptimiserConfig(weight_decay=0.0)
    checkpoints: CheckpointConfig = CheckpointConfig(every_steps=20)
    evaluation: RlEvaluation = RlEvaluation()

    def __post_init__(self) -> None:
        at_least_1 = (
            "steps",
            "groups_per_step",
            "updates_per_step",
            "max_running",
            "rollout_workers",
            "tokens_per_microbatch",
            "reward_threads",
        )
        rules = {name: (getattr(self, name) >= 1, "at least 1") for name in at_least_1}
        rules["learning_rate"] = (self.learning_rate > 0.0, "above 0")
        lowest = self.learning_rate if self.end_learning_rate is None else self.end_learning_rate
        rules["end_learning_rate"] = (0.0 <= lowest <= self.learning_rate, "0 to learning_rate")
        rules["warmup_steps"] = (self.warmup_steps >= 0, "0 or more")
        rules["updates_per_step"] = (1 <= self.updates_per_step <= self.groups_per_step, "1 to groups_per_step")
        rules["dtype"] = (self.dtype in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16")
        rules["rollouts"] = (self.rollouts in ("engine", "processes", "ray"), "engine, processes or ray")
        _check("the run", self, rules)
        if self.rollouts == "engine" and self.rollout_workers != 1:
            raise ConfigError("rollout_workers has no effect with rollouts 'engine'; set rollouts to processes or ray.")
        if any(source.temperature == 0.0 for source in self.sources):
            raise ConfigError("a source has temperature 0: all samples of a group would be the same. Give it 1.0.")
        self.scheduler()

    def scheduler(self) -> SchedulerConfig:
        """The part of it that the data scheduler reads."""
        shared = (
            "groups_per_step",
            "seed",
            "dynamic_sampling",
            "max_draws",
            "easy_fraction",
            "unfinished",
            "max_staleness",
        )
        quota_fields = [own.name for own in fields(SourceQuota)]
        quotas = tuple(SourceQuota(**{name: getattr(source, name) for name in quota_fields}) for source in self.sources)
        # where every group is accepted, and what is too much would be thrown away, none is submitted in reserve
        exact = not self.dynamic_sampling and self.unfinished == "abort"
        reserve = {"initial_acceptance": 1.0, "margin": 0.0} if exact else {}
        return SchedulerConfig(quotas, **{name: getattr(self, name) for name in shared}, **reserve)


@dataclass(frozen=True)
class MopdConfig(RlConfig):
    """A run of multi-teacher on-policy distillation: the student writes, the teacher of the domain judges every token.

    Attributes:
        teachers: A checkpoint folder for each source, or "self" for the one that the student starts from.
        signal: How a teacher teaches: sampled (log-probabilities of what the student wrote, equations 7 to 9), full
            (reverse KL over the whole vocabulary), top_k (the same over the teacher's likeliest, corrected), forward
            (forward KL over the whole vocabulary), or imitate (cross-entropy on what the teacher wrote).
        top_k: Only with signal top_k (none: 64).
        writer: Who writes what is learned from: the student (on-policy), or the teacher (the usual distillation, for
            comparison).
        min_reward: Learn only from samples with at least this reward (none: from all); with signal imitate, this is
            rejection-sampled fine-tuning.
    """

    teachers: dict[str, str] = field(default_factory=dict)
    signal: Literal["sampled", "full", "top_k", "forward", "imitate"] = "sampled"
    top_k: int | None = None
    writer: Literal["student", "teacher"] = "student"
    min_reward: float | None = None
    algorithm: str = "mopd"
    groups_per_step: int = 64
    dynamic_sampling: bool = False
    easy_fraction: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.writer == "teacher" and self.rollouts != "engine":
            raise ConfigError(f"rollouts {self.rollouts!r} has no effect with writer 'teacher'; leave it out.")
        if self.top_k is not None and self.signal != "top_k":
            raise ConfigError(f"top_k has no effect with signal {self.signal!r}; leave it out.")
        if self.writer == "teacher" and self.signal == "sampled":
            raise ConfigError("signal 'sampled' scores what the student wrote; with writer 'teacher' take another.")
        if self.signal == "imitate" and self.writer == "student":
            raise ConfigError("signal 'imitate' copies what was written; with writer 'student' that teaches nothing.")


@dataclass(frozen=True)
class CompareConfig:
    """A see-saw report: models in every domain, against the base and each domain's teacher.

    Attributes:
        run_folder: Where report and results go.
        base: The checkpoint that all of them started from.
        sources: The domains.
        models: By name, the checkpoints of a method: one for each seed.
        teachers: For each domain that has one, the name of its teacher among the models.
        problems: Held-out problems of each domain.
        temperature: 0 answers greedily.
        seed: Decides the problems (and answers, above temperature 0).
        device: auto (an accelerator if there is one), cpu, or a device of torch.
        threads: CPU threads of torch (0: as torch chooses).
        engine: Cache and batching.
    """

    run_folder: str
    base: str
    sources: tuple[RlSource, ...]
    models: dict[str, tuple[str, ...]]
    teachers: dict[str, str] = field(default_factory=dict)
    problems: int = 200
    temperature: float = 0.0
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    engine: EngineConfig = EngineConfig(max_sequences=128, prefill_tokens=4096, speculative=False)
