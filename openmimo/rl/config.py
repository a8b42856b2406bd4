"""The settings of reinforcement learning, without torch."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, Literal

from openmimo.core.errors import ConfigError
from openmimo.core.fields import (
    Bounds,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    check_fields,
    renamed_keys,
)
from openmimo.engine.config import EngineConfig
from openmimo.train.config import CheckpointConfig, FromCheckpoint, OptimizerConfig, ParallelConfig, RunConfig, part_of

PositiveFraction = Annotated[float, Bounds(above=0, most=1)]
AtLeastOne = Annotated[float, Bounds(least=1)]
MAX_STALENESS = 4


def _refuse_changed(config: object, defaults: dict[str, Any], setting: str) -> None:
    """Raises ConfigError for a field that is not at its default, and has no effect with `setting`."""
    for name, default in defaults.items():
        value = getattr(config, name)
        if value != default:
            raise ConfigError(f"{name} is {value!r}, which has no effect with {setting}; leave it out.")


@dataclass(frozen=True)
class SourceQuota:
    """One source of problems, and its part of every batch.

    Attributes:
        name: The name of its stream.
        quota: Its part of the groups of a batch, relative to the other quotas. Quotas that add up to
            SchedulerConfig.groups_per_step are numbers of groups.
        priority: Sources with lower numbers are submitted first, such as those whose rewards take long.
        samples_per_prompt: Answers to each problem, which make a group.
        max_prompt_tokens: Problems with longer prompts are dropped and counted (none: those that leave the model no
            room for an answer).
        max_answer_tokens: Tokens of an answer, at most, over all the steps in which it is written.
        temperature: At which answers are sampled.
        environment: A file in `openmimo/rl/environments`, or `package.module:Object`.
    """

    name: str
    quota: PositiveFloat = 1.0
    priority: int = 0
    samples_per_prompt: PositiveInt = 8
    max_prompt_tokens: PositiveInt | None = None
    max_answer_tokens: PositiveInt = 1024
    temperature: NonNegativeFloat = 1.0
    environment: str = "task"

    def __post_init__(self) -> None:
        check_fields(self, f"source {self.name!r}")
        if not self.name or "/" in self.name:
            raise ConfigError(f"a source has the name {self.name!r}; it must be a name without '/'.")


@dataclass(frozen=True, kw_only=True)
class SchedulingConfig:
    """How the data scheduler weighs speed against waste.

    Attributes:
        margin: Submit this share more groups than are expected to be needed.
        initial_acceptance: The share of groups that is expected to be accepted before any is known.
        min_acceptance: The lowest such expectation, which bounds how many groups run at once.
        source_smoothing: Weight of the newest group in the running means of a source.
        problem_smoothing: Weight of the newest group in the running pass rate of a problem.
        min_pass_rate: Problems whose running pass rate is lower are stepped over in their stream.
        max_pass_rate: Problems whose running pass rate is higher are stepped over in their stream.
        revisit_fraction: The probability that such a problem is drawn nevertheless, so that its pass rate stays known.
        remembered_problems: Problems of a source in its easy pool, and with a known pass rate, at most; the longest
            unseen go first.
        max_sample_retries: How often a sample is rolled out again after an infrastructure error; then its group goes.
        wait_age: Only with unfinished "partial": a step waits for unfinished groups that are at least this many
            versions old, and leaves younger ones for later. 0 waits for every group older than those selected;
            max_staleness waits only for those that would be too old next time; max_staleness + 1, the default, never
            waits, so that one endless answer holds nothing up and is dropped once it is too old.
        max_partial_fraction: Only with unfinished "partial": of the samples of a full batch, at most this share may
            have tokens older than the policy.
    """

    margin: NonNegativeFloat = 0.1
    initial_acceptance: PositiveFraction = 0.5
    min_acceptance: PositiveFraction = 0.05
    source_smoothing: PositiveFraction = 0.05
    problem_smoothing: PositiveFraction = 0.5
    min_pass_rate: Fraction = 0.0
    max_pass_rate: Fraction = 1.0
    revisit_fraction: Fraction = 0.1
    remembered_problems: PositiveInt = 100_000
    max_sample_retries: NonNegativeInt = 2
    wait_age: NonNegativeInt | None = None
    max_partial_fraction: PositiveFraction = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "scheduling")
        if self.min_pass_rate > self.max_pass_rate:
            raise ConfigError(
                f"scheduling: min_pass_rate is {self.min_pass_rate}, which is above max_pass_rate, "
                f"{self.max_pass_rate}; no problem would be drawn twice."
            )
        if self.min_pass_rate == 0.0 and self.max_pass_rate == 1.0:
            unused = {"problem_smoothing": 0.5, "revisit_fraction": 0.1}
            _refuse_changed(self, unused, "min_pass_rate 0 and max_pass_rate 1, which draw every problem")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What a batch of groups is.

    Attributes:
        groups_per_step: Groups of a batch: one problem each.
        dynamic_sampling: Drop groups whose rewards are all equal, and draw others in their place.
        max_draws: The draws of a source in one step, at most, as a multiple of its groups in the batch. When the limit
            is reached, the step trains on a smaller batch.
        easy_fraction: Problems that were solved in every sample are drawn with this probability only, all of them
            together (none: they stay in their stream like the others).
        unfinished: What happens to groups that are not finished when a batch is: "abort" drops them, and with them the
            finished groups that the batch has no room for (keeping only those would favor short answers); "partial"
            carries both over to the next step.
        max_staleness: Only with unfinished "partial": samples with a token that is at most this many versions older
            than the policy are learned from; older ones never.
    """

    groups_per_step: PositiveInt = 32
    dynamic_sampling: bool = True
    max_draws: AtLeastOne = 10.0
    easy_fraction: Fraction | None = 0.1
    unfinished: Literal["abort", "partial"] = "abort"
    max_staleness: NonNegativeInt = MAX_STALENESS


@dataclass(frozen=True)
class SchedulerConfig(BatchConfig, SchedulingConfig):
    """What is rolled out, and what a batch is.

    Attributes:
        sources: Where problems come from.
        seed: Determines which draws come from the easy problems.
    """

    sources: tuple[SourceQuota, ...]
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "the scheduler")
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"the sources are {names}; there must be at least one, each with a name of its own.")
        if self.unfinished == "partial":
            self._check_partial()
        else:
            if self.wait_age:
                raise ConfigError(
                    f"wait_age is {self.wait_age}, which has no effect with unfinished 'abort'; leave it out."
                )
        if self.dynamic_sampling and any(source.samples_per_prompt == 1 for source in self.sources):
            raise ConfigError(
                "With samples_per_prompt=1 all rewards of a group are equal, so dynamic_sampling would drop every "
                "group; ask for more samples, or set dynamic_sampling=False."
            )

    def _check_partial(self) -> None:
        if self.max_staleness < 1:
            raise ConfigError("max_staleness is 0; with unfinished 'partial' it must be at least 1.")
        if self.effective_wait_age > self.max_staleness + 1:
            raise ConfigError(
                f"wait_age is {self.wait_age}; it must be at most max_staleness + 1, which is {self.max_staleness + 1}."
            )

    @property
    def effective_wait_age(self) -> int:
        """The value of `wait_age`, or its default. It is 0 with "abort", because no later step continues a group."""
        if self.unfinished == "abort":
            return 0
        return self.max_staleness + 1 if self.wait_age is None else self.wait_age


@dataclass(frozen=True)
class RlSource(SourceQuota):
    """One source of a run: an environment with its settings, and its part of every batch.

    Attributes:
        options: Settings of the environment (its `options` dataclass lists them).
    """

    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RlEvaluation:
    """Held-out problems.

    Attributes:
        every_steps: Steps between two; there is one before the first step and one after the last, too.
        problems: Of each source.
        temperature: 0 answers greedily; 1 measures the policy that is trained.
    """

    every_steps: PositiveInt = 50
    problems: PositiveInt = 100
    temperature: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")


@renamed_keys()
@dataclass(frozen=True)
class RlConfig(BatchConfig, RunConfig, FromCheckpoint):
    """A complete run of reinforcement learning, from a checkpoint to a better one.

    Attributes:
        sources: Where problems come from; the name of a source is its domain.
        steps: Batches to learn from.
        algorithm: A file in `openmimo/rl/algorithms`, or `package.module:Object`.
        algorithm_options: Settings of that algorithm (its `options` dataclass lists them); on the command line,
            `--algorithm-options.NAME VALUE` for each.
        updates_per_step: Optimizer steps on each batch, over its groups in as many parts.
        learning_rate: After the warm-up.
        end_learning_rate: To which it falls along a cosine until the last step (none: it stays).
        warmup_steps: Steps in which it rises linearly.
        scheduling: Reserves, retries, and what "partial" waits for.
        environment_seconds: How long opening an episode, answering the policy, or a reward may take. A call that takes
            longer is given up and counted (a Python thread cannot be killed: it stays until it returns).
        timeout_reward: The reward of a sample whose environment took too long (none: it counts as lost to a failure of
            the infrastructure, and is rolled out again).
        max_lost_steps: Steps in a row in which a source may lose every sample to errors of its environment; one more
            ends the run.
        thinking: Ask for answers with thoughts before them, which environments do not see.
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
        engine: Cache and drafting of the rollouts.
        evaluation: Held-out problems.
        parallel: Mesh of a run on several devices, which divides the trainer. With rollouts "engine", each process
            has an engine with a copy of the policy.
    """

    sources: tuple[RlSource, ...]
    _: KW_ONLY
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    steps: PositiveInt = 200
    algorithm: str = "grpo"
    algorithm_options: dict[str, Any] = field(default_factory=dict)
    groups_per_step: PositiveInt = 16
    updates_per_step: PositiveInt = 1
    learning_rate: PositiveFloat = 1e-6
    end_learning_rate: NonNegativeFloat | None = None
    warmup_steps: NonNegativeInt = 0
    max_draws: AtLeastOne = 4.0
    scheduling: SchedulingConfig = SchedulingConfig()
    environment_seconds: PositiveFloat = 300.0
    timeout_reward: Fraction | None = None
    max_lost_steps: NonNegativeInt = 0
    thinking: bool = False
    replay_routing: bool = True
    bias_rate: NonNegativeFloat = 0.0
    mtp_weight: NonNegativeFloat = 0.1
    max_running: PositiveInt = 128
    rollouts: Literal["engine", "processes", "ray"] = "engine"
    rollout_workers: PositiveInt = 1
    tokens_per_microbatch: PositiveInt = 8192
    reward_threads: PositiveInt = 4
    engine: EngineConfig = EngineConfig(
        max_sequences=128, prefill_tokens=4096, mixed_prefill_tokens=1024, speculative=False
    )
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.0)
    checkpoints: CheckpointConfig = CheckpointConfig(every_steps=20)
    evaluation: RlEvaluation = RlEvaluation()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        check_fields(self, "the run")
        self.activations.check(checkpointing=self.activation_checkpointing)
        if self.end_learning_rate is not None and self.end_learning_rate > self.learning_rate:
            raise ConfigError(
                f"end_learning_rate is {self.end_learning_rate}; it must be at most learning_rate, "
                f"{self.learning_rate}."
            )
        if self.updates_per_step > self.groups_per_step:
            raise ConfigError(
                f"updates_per_step is {self.updates_per_step}; it must be at most groups_per_step, "
                f"{self.groups_per_step}."
            )
        if self.unfinished == "abort":
            setting = "unfinished 'abort', which carries no sample over"
            _refuse_changed(self, {"max_staleness": MAX_STALENESS}, setting)
            _refuse_changed(self.scheduling, {"wait_age": None, "max_partial_fraction": 1.0}, setting)
        if self.rollouts == "engine" and self.rollout_workers != 1:
            raise ConfigError("rollout_workers has no effect with rollouts 'engine'; set rollouts to processes or ray.")
        if any(source.temperature == 0.0 for source in self.sources):
            raise ConfigError("a source has temperature 0: all samples of a group would be the same. Give it 1.0.")
        self.scheduler()

    def scheduler(self) -> SchedulerConfig:
        """The part of it that the data scheduler reads."""
        shared = part_of(self, BatchConfig)
        quotas = tuple(SourceQuota(**part_of(source, SourceQuota)) for source in self.sources)
        details = part_of(self.scheduling, SchedulingConfig)
        # where every group is accepted, and what is too much would be thrown away, none is submitted in reserve
        if not self.dynamic_sampling and self.unfinished == "abort":
            usual = SchedulingConfig()
            without_effect = {name: getattr(usual, name) for name in ("margin", "initial_acceptance")}
            _refuse_changed(self.scheduling, without_effect, "dynamic_sampling off and unfinished 'abort'")
            details |= {"initial_acceptance": 1.0, "margin": 0.0}
        return SchedulerConfig(sources=quotas, seed=self.seed, **shared, **details)


@renamed_keys()
@dataclass(frozen=True, kw_only=True)
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
        teacher_placement: Where teachers are: resident (each process has all of them), turns (each process loads one
            after another from its folder, in every step), spread (each is on one process of several; only with signal
            sampled), sharded (each process of several has a part of all), or auto (the first of resident, spread and
            sharded that takes at most a quarter of the free memory).
    """

    teachers: dict[str, str] = field(default_factory=dict)
    signal: Literal["sampled", "full", "top_k", "forward", "imitate"] = "sampled"
    top_k: PositiveInt | None = None
    writer: Literal["student", "teacher"] = "student"
    min_reward: PositiveFraction | None = None
    teacher_placement: Literal["auto", "resident", "turns", "spread", "sharded"] = "auto"
    algorithm: str = "mopd"
    groups_per_step: PositiveInt = 64
    dynamic_sampling: bool = False
    easy_fraction: Fraction | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.writer == "teacher" and self.rollouts != "engine":
            raise ConfigError(f"rollouts {self.rollouts!r} has no effect with writer 'teacher'; leave it out.")
        if self.teacher_placement == "spread" and self.signal != "sampled":
            raise ConfigError(
                f"teacher_placement 'spread' keeps a teacher on one process; signal {self.signal!r} needs its logits "
                "on all; take 'turns' or 'sharded'."
            )
        if self.writer == "teacher" and self.teacher_placement in ("turns", "sharded"):
            raise ConfigError(
                f"teacher_placement is {self.teacher_placement!r}, but with writer 'teacher' the engines of a process "
                "run all teachers; take 'resident'."
            )
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
        thinking: Ask for answers with thoughts before them.
        device: auto (an accelerator if there is one), cpu, or a device of torch.
        threads: CPU threads of torch (0: as torch chooses).
        engine: Cache and batching.
    """

    run_folder: str
    base: str
    sources: tuple[RlSource, ...]
    models: dict[str, tuple[str, ...]]
    teachers: dict[str, str] = field(default_factory=dict)
    problems: PositiveInt = 200
    temperature: NonNegativeFloat = 0.0
    seed: Seed = 0
    thinking: bool = False
    device: str = "auto"
    threads: NonNegativeInt = 0
    engine: EngineConfig = EngineConfig(max_sequences=128, prefill_tokens=4096, speculative=False)

    def __post_init__(self) -> None:
        check_fields(self, "the comparison")
