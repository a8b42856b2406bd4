"""What a pre-training run is, without torch: stages, schedules, mixtures. Recipes in `recipes/` return these."""

from dataclasses import dataclass
from typing import Any

from openmimo.core.errors import ConfigError
from openmimo.data.config import MixtureConfig


def _check_at_least_1(config: Any, where: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{where} has {name} {getattr(config, name)}; it must be 1 or more.")


@dataclass(frozen=True)
class Stage:
    """One stage of training (paper section 3.1).

    Attributes:
        name: Shown in metrics and plots.
        steps: Optimiser steps.
        sequence_length: Tokens in a row.
        rows: Rows in an optimiser step.
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
    steps: int
    sequence_length: int
    rows: int
    peak_lr: float
    end_lr: float
    mixture: MixtureConfig
    warmup_steps: int = 0
    constant_steps: int = 0
    rows_at_start: int | None = None
    rows_warmup_steps: int = 0
    mtp_weight: float = 0.3
    bias_rate: float = 1e-3
    full_rope_theta: float | None = None
    mtp_heads: int | None = None

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        _check_at_least_1(self, where, "steps", "sequence_length", "rows")
        if self.rows_at_start is not None:
            _check_at_least_1(self, where, "rows_at_start")
        if self.warmup_steps + self.constant_steps > self.steps:
            raise ConfigError(
                f"{where} warms up for {self.warmup_steps} and holds for {self.constant_steps} steps, which is more "
                f"than its {self.steps} steps."
            )
        if (self.rows_at_start is None) != (self.rows_warmup_steps == 0):
            raise ConfigError(f"{where}: rows_at_start and rows_warmup_steps have an effect only together.")


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW as in the report (paper section 3.1).

    Attributes:
        beta1: Decay of the gradient's running mean.
        beta2: Decay of its running square.
        epsilon: Added to the root of the running square.
        weight_decay: On matrices; norms, sinks and biases have none.
        clip_norm: Gradients are scaled down to this norm.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True)
class CheckpointConfig:
    """When to write a checkpoint, and which to keep.

    Attributes:
        every_steps: Optimiser steps between two.
        keep_last: How many of the newest are kept.
        keep_every: Those of every so many steps are kept for good (0: none).
    """

    every_steps: int = 200
    keep_last: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        _check_at_least_1(self, "checkpoints", "every_steps", "keep_last")


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation on held-out documents.

    Attributes:
        every_steps: Optimiser steps between two.
        batches: Micro-batches in each.
    """

    every_steps: int = 100
    batches: int = 2

    def __post_init__(self) -> None:
        _check_at_least_1(self, "evaluation", "every_steps", "batches")


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from.

    Attributes:
        path: A folder with a tokenizer.json (None: train a byte-level BPE on the first stage that has text).
        train_megabytes: How much text to train it on (10^6 bytes).
    """

    path: str | None = None
    train_megabytes: float = 4.0


@dataclass(frozen=True)
class PretrainConfig:
    """A complete pre-training run.

    Attributes:
        run_folder: Where everything goes; a run that finds its own checkpoints there goes on from the newest.
        stages: One after the other.
        model: A preset of `openmimo/model/presets.py`, or the path of a config.json.
        init_from: A checkpoint folder to start from instead of random weights.
        seed: Decides initial weights and the order of the data.
        device: auto (an accelerator if there is one), cpu, or a device of torch.
        dtype: Of the activations: float32, bfloat16, or auto (bfloat16 wherever there are instructions for it);
            parameters and optimiser stay in float32.
        threads: CPU threads of torch (0: as torch chooses).
        rows_per_microbatch: Rows in memory at once; an optimiser step accumulates over several.
        activation_checkpointing: Recompute each layer in the backward pass instead of keeping its activations.
        balance_weight: Of the sequence-level balance loss.
        loader_workers: Threads that prepare rows ahead (the rows are the same for any number).
        tensorboard: Write event files to `<run_folder>/tensorboard` too.
        log_every_steps: Optimiser steps between two lines of metrics.
        optimiser: AdamW and gradient clipping.
        checkpoints: When they are written, which are kept.
        evaluation: Validation on held-out documents.
        tokenizer: Where it comes from.
    """

    run_folder: str
    stages: tuple[Stage, ...]
    model: str = "tiny"
    init_from: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    rows_per_microbatch: int = 8
    activation_checkpointing: bool = False
    balance_weight: float = 1e-5
    loader_workers: int = 0
    tensorboard: bool = False
    log_every_steps: int = 10
    optimiser: OptimiserConfig = OptimiserConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("the run has no stages.")
        _check_at_least_1(self, "the run", "rows_per_microbatch", "log_every_steps")
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
        steps: Optimiser steps.
        rows: Rows in an optimiser step.
        peak_lr: Learning rate after the warm-up.
        end_lr: Learning rate at the end of the cosine.
        warmup_steps: Steps of linear warm-up of the learning rate.
        mtp_weight: Weight of the mean loss of the MTP heads.
        bias_rate: Step of the experts' selection bias.
        mtp_heads: MTP heads from here on, grown by copying the last (None: unchanged).
        seed: Decides initial weights and the order of the data.
        device: auto (an accelerator if there is one), cpu, or a device of torch.
        dtype: Of the activations: float32, bfloat16, or auto (bfloat16 wherever there are instructions for it);
            parameters and optimiser stay in float32.
        threads: CPU threads of torch (0: as torch chooses).
        rows_per_microbatch: Rows in memory at once; an optimiser step accumulates over several.
        activation_checkpointing: Recompute each layer in the backward pass instead of keeping its activations.
        balance_weight: Of the sequence-level balance loss.
        loader_workers: Threads that prepare rows ahead (the rows are the same for any number).
        tensorboard: Write event files to `<run_folder>/tensorboard` too.
        log_every_steps: Optimiser steps between two lines of metrics.
        optimiser: AdamW and gradient clipping.
        checkpoints: When they are written, which are kept.
        evaluation: Validation on held-out documents.
    """

    checkpoint: str
    run_folder: str
    mixture: MixtureConfig
    sequence_length: int
    full_rope_theta: float
    steps: int
    rows: int
    peak_lr: float
    end_lr: float
    warmup_steps: int = 0
    mtp_weight: float = 0.1
    bias_rate: float = 1e-5
    mtp_heads: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    rows_per_microbatch: int = 1
    activation_checkpointing: bool = False
    balance_weight: float = 1e-5
    loader_workers: int = 0
    tensorboard: bool = False
    log_every_steps: int = 10
    optimiser: OptimiserConfig = OptimiserConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
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
        steps: Optimiser steps.
        sequence_length: Tokens in a row; whole conversations are packed into it.
        rows: Rows in an optimiser step.
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
        rows_per_microbatch: Rows in memory at once; an optimiser step accumulates over several.
        activation_checkpointing: Recompute each layer in the backward pass instead of keeping its activations.
        balance_weight: Of the sequence-level balance loss.
        loader_workers: Threads that prepare rows ahead (the rows are the same for any number).
        tensorboard: Write event files to `<run_folder>/tensorboard` too.
        log_every_steps: Optimiser steps between two lines of metrics.
        optimiser: AdamW and gradient clipping.
        checkpoints: When they are written, which are kept.
        evaluation: Validation on held-out rows.
    """

    checkpoint: str
    run_folder: str
    mixture: MixtureConfig
    steps: int
    sequence_length: int
    rows: int = 128
    peak_lr: float = 5e-5
    end_lr: float = 5e-6
    warmup_steps: int = 0
    mtp_weight: float = 0.1
    mtp_heads: int | None = None
    bias_rate: float = 1e-4
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    rows_per_microbatch: int = 8
    activation_checkpointing: bool = False
    balance_weight: float = 1e-6
    loader_workers: int = 0
    tensorboard: bool = False
    log_every_steps: int = 10
    optimiser: OptimiserConfig = OptimiserConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        self.as_pretraining()

    def as_pretraining(self) -> PretrainConfig:
        """The same run as a pre-training run of one stage that starts from the checkpoint. Raises ConfigError."""
        return PretrainConfig(
            init_from=self.checkpoint,
            stages=(_one_stage("sft", self),),
            **{name: getattr(self, name) for name in _OF_RUN},
        )


_OF_RUN = ("run_folder", "seed", "device", "dtype", "threads", "rows_per_microbatch", "activation_checkpointing",
           "balance_weight", "loader_workers", "tensorboard", "log_every_steps", "optimiser", "checkpoints",
           "evaluation")  # fmt: skip
_OF_STAGE = ("steps", "sequence_length", "rows", "peak_lr", "end_lr", "mixture", "warmup_steps", "mtp_weight",
             "bias_rate", "mtp_heads")  # fmt: skip


def _one_stage(name: str, config: "ExtendConfig | SftConfig", **changes: Any) -> Stage:
    return Stage(name=name, **{own: getattr(config, own) for own in _OF_STAGE}, **changes)
