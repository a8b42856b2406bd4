"""What a pre-training run is, without torch: stages, schedules, mixtures. Recipes in `recipes/` return these."""

from dataclasses import dataclass
from typing import Annotated, Any

from openmimo.core.errors import ConfigError
from openmimo.core.fields import (
    Bounds,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    check_fields,
)
from openmimo.data.config import MixtureConfig

Threads = Annotated[int, Bounds(least=0, most=1024)]
Decay = Annotated[float, Bounds(least=0, below=1)]


def check_path(path: str | None, where: str) -> None:
    """Raises ConfigError for a path that cannot be one; None is allowed."""
    if path is not None and (not path.strip() or "\0" in path):
        raise ConfigError(f"{where} is {path!r}; it must be the path of a folder.")


@dataclass(frozen=True)
class Stage:
    """One stage of training (paper section 3.1).

    Attributes:
        name: Shown in metrics and plots.
        steps: Optimizer steps.
        sequence_length: Tokens in a row.
        rows: Rows in an optimizer step.
        peak_lr: Learning rate after the warm-up.
        end_lr: Learning rate at the end of the cosine.
        mixture: The data and its weights.
        warmup_steps: Steps of linear warm-up of the learning rate.
        constant_steps: Steps at the peak, before the cosine.
        rows_at_start: Rows in the first step of a batch-size warm-up (None: no such warm-up).
        rows_warmup_steps: Steps in which the rows rise linearly to `rows`.
        mtp_weight: Weight of the mean loss of the MTP heads.
        bias_rate: Step of the experts' selection bias.
        full_rope_theta: RoPE base of the full layers from here on (None: unchanged).
        mtp_heads: MTP heads from here on, grown by copying the last (None: unchanged).
    """

    name: str
    steps: PositiveInt
    sequence_length: PositiveInt
    rows: PositiveInt
    peak_lr: NonNegativeFloat
    end_lr: NonNegativeFloat
    mixture: MixtureConfig
    warmup_steps: NonNegativeInt = 0
    constant_steps: NonNegativeInt = 0
    rows_at_start: PositiveInt | None = None
    rows_warmup_steps: NonNegativeInt = 0
    mtp_weight: NonNegativeFloat = 0.3
    bias_rate: NonNegativeFloat = 1e-3
    full_rope_theta: PositiveFloat | None = None
    mtp_heads: PositiveInt | None = None

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        check_fields(self, where)
        if not self.name:
            raise ConfigError("a stage has no name.")
        if self.end_lr > self.peak_lr:
            raise ConfigError(f"{where} has end_lr {self.end_lr} above peak_lr {self.peak_lr}.")
        if self.warmup_steps + self.constant_steps > self.steps:
            raise ConfigError(
                f"{where} warms up for {self.warmup_steps} and holds for {self.constant_steps} steps, which is more "
                f"than its {self.steps} steps."
            )
        if (self.rows_at_start is None) != (self.rows_warmup_steps == 0):
            raise ConfigError(f"{where}: rows_at_start and rows_warmup_steps have an effect only together.")
        if self.rows_at_start is not None and self.rows_at_start > self.rows:
            raise ConfigError(f"{where} has rows_at_start {self.rows_at_start} above rows {self.rows}.")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the report (paper section 3.1).

    Attributes:
        beta1: Decay of the gradient's running mean.
        beta2: Decay of its running square.
        epsilon: Added to the root of the running square.
        weight_decay: On matrices; norms, sinks and biases have none.
        clip_norm: Gradients are scaled down to this norm.
        max_skipped_steps: Steps in a row that are skipped if their loss or gradients are not finite; one more ends the
            run (0: the first does).
    """

    beta1: Decay = 0.9
    beta2: Decay = 0.95
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat = 1.0
    max_skipped_steps: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to write a checkpoint, and which to keep.

    Attributes:
        every_steps: Optimizer steps between two.
        keep_last: How many of the newest are kept.
        keep_every: Those of every so many steps are kept for good (0: none).
    """

    every_steps: PositiveInt = 200
    keep_last: PositiveInt = 2
    keep_every: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_fields(self, "checkpoints")


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation on held-out documents.

    Attributes:
        every_steps: Optimizer steps between two.
        batches: Micro-batches in each.
    """

    every_steps: PositiveInt = 100
    batches: PositiveInt = 2

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from.

    Attributes:
        path: A folder with a tokenizer.json (None: train a byte-level BPE on the first stage that has text).
        train_megabytes: How much text to train it on (10^6 bytes).
    """

    path: str | None = None
    train_megabytes: PositiveFloat = 4.0

    def __post_init__(self) -> None:
        check_fields(self, "tokenizer")
        check_path(self.path, "tokenizer.path")


@dataclass(frozen=True)
class PretrainConfig:
    """A complete pre-training run.

    Attributes:
        run_folder: Where everything goes; a run that finds its own checkpoints there goes on from the newest.
        stages: One after the other.
        model: A preset of `openmimo/model/presets.py`, or the path of a config.json (None: tiny, or what `init_from`
            holds).
        init_from: A checkpoint folder to start from instead of random weights.
        seed: Decides initial weights and the order of the data.
        device: auto (an accelerator if there is one), cpu, or a device of torch.
        dtype: Of the activations: float32, bfloat16, or auto (bfloat16 wherever there are instructions for it);
            parameters and optimizer stay in float32.
        threads: CPU threads of torch (0: as torch chooses).
        rows_per_microbatch: Rows in memory at once; an optimizer step accumulates over several.
        activation_checkpointing: Recompute each layer in the backward pass instead of keeping its activations.
        balance_weight: Of the sequence-level balance loss.
        loader_workers: Threads that prepare rows ahead (the rows are the same for any number).
        tensorboard: Write event files to `<run_folder>/tensorboard` too.
        log_every_steps: Optimizer steps between two lines of metrics.
        optimizer: AdamW and gradient clipping.
        checkpoints: When they are written, which are kept.
        evaluation: Validation on held-out documents.
        tokenizer: Where it comes from.
    """

    run_folder: str
    stages: tuple[Stage, ...]
    model: str | None = None
    init_from: str | None = None
    seed: Seed = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: Threads = 0
    rows_per_microbatch: PositiveInt = 8
    activation_checkpointing: bool = False
    balance_weight: NonNegativeFloat = 1e-5
    loader_workers: Threads = 0
    tensorboard: bool = False
    log_every_steps: PositiveInt = 10
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()

    def __post_init__(self) -> None:
        check_fields(self, "the run")
        if not self.stages:
            raise ConfigError("the run has no stages.")
        check_path(self.run_folder, "run_folder")
        check_path(self.init_from, "init_from")
        if self.init_from is not None and self.model is not None:
            raise ConfigError(
                f"init_from {self.init_from!r} brings its own model, so model {self.model!r} has no effect; leave it "
                "out (on the command line: --model None)."
            )
        has_tokenizer = self.init_from is not None or self.tokenizer.path is not None
        if has_tokenizer and self.tokenizer.train_megabytes != TokenizerConfig.train_megabytes:
            raise ConfigError("tokenizer.train_megabytes has no effect on a tokenizer that exists; leave it out.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float64"):
            raise ConfigError(f"dtype {self.dtype!r} is unknown; train in 'auto', 'bfloat16' or 'float32'.")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"two stages share a name: {', '.join(names)}.")


@dataclass(frozen=True)
class ExtendConfig:
    """Context extension alone: the report's stage 3 on a checkpoint that exists (paper section 3.1).

    Attributes:
        checkpoint: The model folder to extend.
        run_folder: Where everything goes; a run that finds its own checkpoints there goes on from the newest.
        mixture: The data and its weights.
        sequence_length: Tokens in a row from now on.
        full_rope_theta: RoPE base of the full layers from now on (the report raises it as it raises the length).
        steps: Optimizer steps.
        rows: Rows in an optimizer step.
        peak_lr: Learning rate after the warm-up.
        end_lr: Learning rate at the end of the cosine.
        warmup_steps: Steps of linear warm-up of the learning rate.
        mtp_weight: Weight of the mean loss of the MTP heads.
        bias_rate: Step of the experts' selection bias.
        mtp_heads: MTP heads from here on, grown by copying the last (None: unchanged).
        seed: Decides initial weights and the order of the data.
        device: auto (an accelerator if there is one), cpu, or a device of torch.
        dtype: Of the activations: float32, bfloat16, or auto (bfloat16 wherever there are instructions for it);
            parameters and optimizer stay in float32.
        threads: CPU threads of torch (0: as torch chooses).
        rows_per_microbatch: Rows in memory at once; an optimizer step accumulates over several.
        activation_checkpointing: Recompute each layer in the backward pass instead of keeping its activations.
        balance_weight: Of the sequence-level balance loss.
        loader_workers: Threads that prepare rows ahead (the rows are the same for any number).
        tensorboard: Write event files to `<run_folder>/tensorboard` too.
        log_every_steps: Optimizer steps between two lines of metrics.
        optimizer: AdamW and gradient clipping.
        checkpoints: When they are written, which are kept.
        evaluation: Validation on held-out documents.
    """

    checkpoint: str
    run_folder: str
    mixture: MixtureConfig
    sequence_length: PositiveInt
    full_rope_theta: PositiveFloat
    steps: PositiveInt
    rows: PositiveInt
    peak_lr: NonNegativeFloat
    end_lr: NonNegativeFloat
    warmup_steps: NonNegativeInt = 0
    mtp_weight: NonNegativeFloat = 0.1
    bias_rate: NonNegativeFloat = 1e-5
    mtp_heads: PositiveInt | None = None
    seed: Seed = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: Threads = 0
    rows_per_microbatch: PositiveInt = 1
    activation_checkpointing: bool = False
    balance_weight: NonNegativeFloat = 1e-5
    loader_workers: Threads = 0
    tensorboard: bool = False
    log_every_steps: PositiveInt = 10
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        check_fields(self, "extend")
        self.as_pretraining()

    def as_pretraining(self) -> PretrainConfig:
        """The same run as a pre-training run of one stage that starts from the checkpoint. Raises ConfigError."""
        stage = _one_stage("extend", self, full_rope_theta=self.full_rope_theta)
        return PretrainConfig(
            init_from=self.checkpoint, stages=(stage,), **{name: getattr(self, name) for name in _OF_RUN}
        )


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning of a checkpoint on conversations (paper section 4.2; the defaults are the report's).

    Attributes:
        checkpoint: The model folder to start from.
        run_folder: Where everything goes; a run that finds its own checkpoints there goes on from the newest.
        mixture: Demonstrations: sources such as `chat` (conversations of your own) and `tasks`. Only what the assistant
            wrote is learned.
        steps: Optimizer steps.
        sequence_length: Tokens in a row; whole conversations are packed into it.
        rows: Rows in an optimizer step.
        peak_lr: Learning rate after the warm-up.
        end_lr: Learning rate at the end of the cosine.
        warmup_steps: Steps of linear warm-up of the learning rate.
        mtp_weight: Weight of the mean loss of the MTP heads.
        mtp_heads: MTP heads from here on, grown by copying the last (None: unchanged; the report grows them here).
        bias_rate: Step of the experts' selection bias. With Adam's epsilon, what the count of zero gradients is most
            sensitive to: it should stay flat.
        seed: Decides the order of the data.
        device: auto (an accelerator if there is one), cpu, or a device of torch.
        dtype: Of the activations: float32, bfloat16, or auto.
        threads: CPU threads of torch (0: as torch chooses).
        rows_per_microbatch: Rows in memory at once; an optimizer step accumulates over several.
        activation_checkpointing: Recompute each layer in the backward pass instead of keeping its activations.
        balance_weight: Of the sequence-level balance loss.
        loader_workers: Threads that prepare rows ahead (the rows are the same for any number).
        tensorboard: Write event files to `<run_folder>/tensorboard` too.
        log_every_steps: Optimizer steps between two lines of metrics.
        optimizer: AdamW and gradient clipping.
        checkpoints: When they are written, which are kept.
        evaluation: Validation on held-out rows.
    """

    checkpoint: str
    run_folder: str
    mixture: MixtureConfig
    steps: PositiveInt
    sequence_length: PositiveInt
    rows: PositiveInt = 128
    peak_lr: NonNegativeFloat = 5e-5
    end_lr: NonNegativeFloat = 5e-6
    warmup_steps: NonNegativeInt = 0
    mtp_weight: NonNegativeFloat = 0.1
    mtp_heads: PositiveInt | None = None
    bias_rate: NonNegativeFloat = 1e-4
    seed: Seed = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: Threads = 0
    rows_per_microbatch: PositiveInt = 8
    activation_checkpointing: bool = False
    balance_weight: NonNegativeFloat = 1e-6
    loader_workers: Threads = 0
    tensorboard: bool = False
    log_every_steps: PositiveInt = 10
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        check_fields(self, "sft")
        self.as_pretraining()

    def as_pretraining(self) -> PretrainConfig:
        """The same run as a pre-training run of one stage that starts from the checkpoint. Raises ConfigError."""
        return PretrainConfig(
            init_from=self.checkpoint,
            stages=(_one_stage("sft", self),),
            **{name: getattr(self, name) for name in _OF_RUN},
        )


_OF_RUN = ("run_folder", "seed", "device", "dtype", "threads", "rows_per_microbatch", "activation_checkpointing",
           "balance_weight", "loader_workers", "tensorboard", "log_every_steps", "optimizer", "checkpoints",
           "evaluation")  # fmt: skip
_OF_STAGE = ("steps", "sequence_length", "rows", "peak_lr", "end_lr", "mixture", "warmup_steps", "mtp_weight",
             "bias_rate", "mtp_heads")  # fmt: skip


def _one_stage(name: str, config: "ExtendConfig | SftConfig", **changes: Any) -> Stage:
    return Stage(name=name, **{own: getattr(config, own) for own in _OF_STAGE}, **changes)
