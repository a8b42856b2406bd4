"""Configs of training runs, without torch. The recipes in `recipes/` return these.

Settings that several commands share are declared once, in a base class: `RunConfig` (every run), `TrainConfig`
(pretrain, extend, sft), `PhaseSettings` (one phase of training) and `FromCheckpoint`. Each setting therefore has one
name in Python, in `config.json` and on the command line.
"""

from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Annotated, Any, Literal, TypeVar

from openmimo.core.errors import ConfigError
from openmimo.core.fields import (
    Bounds,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    check_fields,
    renamed_keys,
    renamed_names,
)
from openmimo.data.config import MixtureConfig
from openmimo.model.attention import RopeScaling
from openmimo.model.config import ActivationConfig

Threads = Annotated[int, Bounds(least=0, most=1024)]
Decay = Annotated[float, Bounds(least=0, below=1)]


def check_path(path: str | None, where: str) -> None:
    """Raise ConfigError for an invalid path; None is allowed."""
    if path is not None and (not path.strip() or "\0" in path):
        raise ConfigError(f"{where} is {path!r}; it must be the path of a folder.")


def part_of(config: Any, base: type) -> dict[str, Any]:
    """Return the fields of a config that its base class `base` declares, with their values."""
    return {field.name: getattr(config, field.name) for field in fields(base)}


@renamed_keys({
    "rows": "global_batch_size", "peak_lr": "learning_rate", "end_lr": "end_learning_rate",
    "rows_at_start": "initial_batch_size", "rows_warmup_steps": "batch_warmup_steps",
})  # fmt: skip
@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """Data, length, batch size and learning rate of one phase of training.

    Attributes:
        steps: Optimizer steps.
        sequence_length: Tokens per sequence. Documents and conversations are packed into it.
        global_batch_size: Sequences per optimizer step.
        learning_rate: Learning rate after the warm-up.
        end_learning_rate: Learning rate at the end of the decay.
        mixture: The data sources and their weights.
        warmup_steps: Steps of linear warm-up of the learning rate.
        mtp_weight: Weight of the mean loss of the MTP heads.
        bias_rate: Step size of the experts' selection bias. It and Adam's epsilon affect the number of zero gradients
            most; that number should remain constant.
        mtp_heads: Number of MTP heads from this phase on. New heads are copies of the last one (None: unchanged).
    """

    steps: PositiveInt
    sequence_length: PositiveInt
    global_batch_size: PositiveInt
    learning_rate: NonNegativeFloat
    end_learning_rate: NonNegativeFloat
    mixture: MixtureConfig
    warmup_steps: NonNegativeInt = 0
    mtp_weight: NonNegativeFloat = 0.1
    bias_rate: NonNegativeFloat = 1e-3
    mtp_heads: PositiveInt | None = None


@renamed_keys()
@dataclass(frozen=True)
class Phase(PhaseSettings):
    """One phase of pre-training (paper section 3.1).

    Attributes:
        name: Name in metrics and plots.
        decay: Form of the decay of the learning rate, "cosine" or "linear".
        weight_decay: Weight decay in this phase (None: that of the optimizer).
        constant_steps: Steps at the peak learning rate, before the decay.
        initial_batch_size: Sequences in the first step of a batch-size warm-up (None: no warm-up).
        batch_warmup_steps: Steps in which the batch size rises linearly to `global_batch_size`.
        batch_multiple: The batch sizes of that warm-up are multiples of this, for a run on several devices.
        full_rope_theta: RoPE base of the full-attention layers from this phase on (None: unchanged).
        full_rope_scaling: Scaling of RoPE in the full-attention layers from this phase on (none: unchanged).
    """

    name: str
    _: KW_ONLY
    decay: Literal["cosine", "linear"] = "cosine"
    weight_decay: NonNegativeFloat | None = None
    constant_steps: NonNegativeInt = 0
    initial_batch_size: PositiveInt | None = None
    batch_warmup_steps: NonNegativeInt = 0
    batch_multiple: PositiveInt = 1
    mtp_weight: NonNegativeFloat = 0.3
    full_rope_theta: PositiveFloat | None = None
    full_rope_scaling: RopeScaling = RopeScaling()

    def __post_init__(self) -> None:
        where = f"phase {self.name!r}"
        check_fields(self, where)
        if not self.name:
            raise ConfigError("a phase has no name.")
        if self.end_learning_rate > self.learning_rate:
            raise ConfigError(
                f"{where} has end_learning_rate {self.end_learning_rate} above learning_rate {self.learning_rate}."
            )
        if self.warmup_steps + self.constant_steps > self.steps:
            raise ConfigError(
                f"{where} warms up for {self.warmup_steps} and holds for {self.constant_steps} steps, which is more "
                f"than its {self.steps} steps: lower warmup_steps and constant_steps to at most {self.steps} together "
                "(in pre-training, --stages.N.warmup-steps and --stages.N.constant-steps)."
            )
        if (self.initial_batch_size is None) != (self.batch_warmup_steps == 0):
            raise ConfigError(f"{where}: initial_batch_size and batch_warmup_steps have an effect only together.")
        if self.initial_batch_size is not None and self.initial_batch_size > self.global_batch_size:
            raise ConfigError(
                f"{where} has initial_batch_size {self.initial_batch_size} above global_batch_size "
                f"{self.global_batch_size}."
            )
        if self.batch_multiple > 1 and self.initial_batch_size is None:
            raise ConfigError(f"{where}: batch_multiple has an effect only with a warm-up of the batch size.")
        if self.global_batch_size % self.batch_multiple or (self.initial_batch_size or 0) % self.batch_multiple:
            raise ConfigError(
                f"{where} has batch_multiple {self.batch_multiple}, which must divide initial_batch_size "
                f"{self.initial_batch_size} and global_batch_size {self.global_batch_size}."
            )


Settings = TypeVar("Settings", bound=PhaseSettings)


def shortened(settings: Settings, steps: int) -> Settings:
    """Return a phase whose warm-up and constant steps, if they exceed `steps`, are scaled to that number of steps."""
    constant = settings.constant_steps if isinstance(settings, Phase) else 0
    if steps >= settings.warmup_steps + constant:
        return settings
    warmup, constant = (count * steps // settings.steps for count in (settings.warmup_steps, constant))
    if isinstance(settings, Phase):
        settings = replace(settings, constant_steps=constant)
    return replace(settings, warmup_steps=warmup)


@dataclass(frozen=True)
class ExpertStepConfig:
    """How an optimizer step treats single experts. By default their weights are parameters like all others.

    Attributes:
        clip_norm: Maximum gradient norm of each expert, before all gradients are clipped together (0: none).
        rate_exponent: The learning rate of an expert is multiplied by r^rate_exponent, at most by 4. r is its share of
            the step's tokens relative to the mean (0: one rate for all; 0.5: square root of the share).
        keep_idle: Leave weights and moments of an expert without tokens in a step unchanged. Adam otherwise decays its
            moments and moves the weights along them.
    """

    clip_norm: NonNegativeFloat = 0.0
    rate_exponent: NonNegativeFloat = 0.0
    keep_idle: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "expert_step")

    @property
    def is_used(self) -> bool:
        """Whether any of the settings has an effect."""
        return self != ExpertStepConfig()


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the settings of the report (paper section 3.1).

    Attributes:
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        epsilon: Added to the square root of the second moment.
        weight_decay: Weight decay of matrices; norms, sinks and biases have none.
        clip_norm: Maximum gradient norm.
        max_skipped_steps: Maximum number of consecutive steps to skip because their loss or gradients are not finite.
            One more ends the run (0: the first one does).
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
    """Interval and retention of checkpoints.

    Attributes:
        every_steps: Optimizer steps between checkpoints.
        keep_last: Number of newest checkpoints to keep.
        keep_every: Also keep all checkpoints at multiples of this step (0: none).
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
        every_steps: Optimizer steps between evaluations.
        batches: Micro-batches per evaluation.
    """

    every_steps: PositiveInt = 100
    batches: PositiveInt = 2

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")


@dataclass(frozen=True)
class TokenizerConfig:
    """Source of the tokenizer.

    Attributes:
        path: A folder with a tokenizer.json (None: train a byte-level BPE on the first phase with text).
        train_megabytes: Amount of text to train it on (10^6 bytes).
    """

    path: str | None = None
    train_megabytes: PositiveFloat = 4.0

    def __post_init__(self) -> None:
        check_fields(self, "tokenizer")
        check_path(self.path, "tokenizer.path")


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh of a run that `torchrun` starts on several devices. The run may continue on another mesh.

    Attributes:
        dp_replicate: Groups of processes that hold the same shards of the weights and read other rows.
        dp_shard: Processes of a group that hold other shards and read other rows (-1: as many as are left).
        cp: Processes that share the tokens of each row. Sliding layers exchange the window's keys only.
        cp_exchange: What full layers exchange with cp: the keys that queries see, heads (each process computes some
            heads of all tokens), or auto (that which moves fewer bytes).
        tp: Processes that share the heads and hidden dims of each layer.
        ep: Processes that hold different experts; it divides dp_shard x cp.
        pp: Processes that hold different layers (pipeline stages). Micro-batches pass through them.
        pp_schedule: Order of the micro-batches: 1f1b, or interleaved with several stages for each process.
        pp_stages: Number of stages (0: pp for 1f1b, 2 pp for interleaved, or what pp_boundaries says).
        pp_boundaries: First layer of every stage after the first (none: stages of equal estimated cost).
        checkpoints: shards (each process writes its part while training goes on) or whole (the main process gathers the
            model and writes the format of one process).
        expert_placement: Which experts the processes of ep hold: off (equal runs in order), forecast (experts move
            between steps; it needs expert_trace), or the path of a JSON file with the experts of each layer's slots.
        placement_every_steps: Steps between two forecasts.
        placement_predictor: Predictor of the load.
    """

    dp_replicate: PositiveInt = 1
    dp_shard: Annotated[int, Bounds(least=-1)] = -1
    cp: PositiveInt = 1
    cp_exchange: Literal["auto", "keys", "heads"] = "auto"
    tp: PositiveInt = 1
    ep: PositiveInt = 1
    pp: PositiveInt = 1
    pp_schedule: Literal["1f1b", "interleaved"] = "1f1b"
    pp_stages: NonNegativeInt = 0
    pp_boundaries: tuple[PositiveInt, ...] = ()
    checkpoints: Literal["shards", "whole"] = "shards"
    expert_placement: str = "off"
    placement_every_steps: PositiveInt = 1000
    placement_predictor: Literal["last_value", "window_average", "exponential_average"] = "window_average"

    def __post_init__(self) -> None:
        check_fields(self, "parallel")
        if self.expert_placement != "off" and self.ep == 1:
            raise ConfigError("parallel.expert_placement has no effect with parallel.ep 1; set it to off.")
        forecast = (self.placement_every_steps, self.placement_predictor)
        if self.expert_placement != "forecast" and forecast != (1000, "window_average"):
            raise ConfigError("parallel.placement_* have an effect only with parallel.expert_placement forecast.")
        if self.dp_shard == 0:
            raise ConfigError("parallel.dp_shard is 0; give the number of processes, or -1 for as many as are left.")
        if self.cp == 1 and self.cp_exchange != "auto":
            raise ConfigError("parallel.cp_exchange has no effect with parallel.cp 1; leave it out, or raise cp.")
        if self.pp == 1 and (self.pp_schedule != "1f1b" or self.pp_stages or self.pp_boundaries):
            raise ConfigError("parallel.pp_schedule, pp_stages and pp_boundaries have no effect with parallel.pp 1.")
        self._check_stages()

    def _check_stages(self) -> None:
        stages = self.num_stages
        if self.pp_boundaries and stages != len(self.pp_boundaries) + 1:
            raise ConfigError(
                f"parallel.pp_boundaries gives {len(self.pp_boundaries) + 1} stages, but there are {stages}; give the "
                "first layer of every stage after the first."
            )
        if self.pp_schedule == "1f1b" and stages != self.pp:
            raise ConfigError(f"the 1f1b schedule has parallel.pp = {self.pp} stages, and not {stages}.")
        if self.pp_schedule == "interleaved" and (stages % self.pp or stages == self.pp):
            raise ConfigError(
                f"the interleaved schedule has two or more stages for each of the {self.pp} processes of a pipeline, "
                f"and not {stages} in total; change parallel.pp_stages or pp_boundaries."
            )

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        if self.pp_stages:
            return self.pp_stages
        if self.pp_boundaries:
            return len(self.pp_boundaries) + 1
        return self.pp if self.pp_schedule == "1f1b" else 2 * self.pp

    @property
    def sizes(self) -> dict[str, int]:
        """The dimensions of the mesh."""
        names = ("dp_replicate", "dp_shard", "cp", "tp", "ep", "pp")
        return {name: getattr(self, name) for name in names}

    def pipeline(self, sequence_length: int) -> dict[str, Any] | None:
        """Return the fields of `parallel.stages.PipelineOptions`, or None without stages."""
        if self.pp == 1:
            return None
        return {
            "schedule": self.pp_schedule,
            "stages": self.num_stages,
            "boundaries": self.pp_boundaries,
            "sequence_length": sequence_length,
        }


@dataclass(frozen=True)
class FromCheckpoint:
    """Settings of a run that starts from a model.

    Attributes:
        checkpoint: The model folder to start from.
    """

    checkpoint: str


@renamed_keys({"optimiser": "optimizer"})
@dataclass(frozen=True)
class RunConfig:
    """Settings of every run.

    Attributes:
        run_folder: Folder of all results. If it contains checkpoints of this run, the run continues from the newest.
        seed: Seed of initial weights, data order and sampling.
        device: auto (an accelerator if available), cpu, or a torch device.
        dtype: Dtype of activations: float32, bfloat16, or auto (bfloat16 if the hardware supports it). Parameters and
            optimizer state are float32.
        threads: CPU threads of torch (0: torch's default).
        activation_checkpointing: Recompute each layer in the backward pass instead of storing its activations.
        activations: What is recomputed, divided into chunks, and kept in host memory.
        tensorboard: Also write event files to `<run_folder>/tensorboard`.
        optimizer: AdamW and gradient clipping.
        checkpoints: Interval and retention of checkpoints.
    """

    run_folder: str
    _: KW_ONLY
    seed: Seed = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: Threads = 0
    activation_checkpointing: bool = False
    activations: ActivationConfig = ActivationConfig()
    tensorboard: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()


@renamed_keys({"rows_per_microbatch": "micro_batch_size"})
@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Settings that pre-training, context extension and fine-tuning share.

    Attributes:
        micro_batch_size: Sequences per micro-batch. An optimizer step accumulates gradients over micro-batches.
        balance_weight: Weight of the balance loss.
        balance_over: Tokens over which that loss counts the visits of experts: each sequence, or the batch so far.
        z_weight: Weight of the routers' z-loss, the mean square of the log-sum-exp of their logits.
        expert_step: How an optimizer step treats single experts; on one device.
        loader_workers: Threads that prepare sequences in advance. Their number does not change the sequences.
        log_every_steps: Optimizer steps between lines of metrics.
        expert_trace: Also record how many tokens each expert received in every step, in
            `<run_folder>/expert_load.bin`, for `openmimo experts`.
        evaluation: Validation on held-out documents.
        parallel: Mesh of a run on several devices.
        quantization: Quantization-aware training: products use int8 inputs and the values of this packed format
            (`kernels/weights.py`), and the weights get their gradient. `openmimo convert --quantize` packs the result.
        quantization_stages: Stages of the packed format.
        fp8: Compute the products of attention's input projections, dense FFNs and experts with FP8 numbers, in both
            passes (paper section 3.1). Weights, optimizer state and checkpoints are as without it. `OPENMIMO_FLOAT8`
            names the kernels (docs/runs.md).
    """

    _: KW_ONLY
    quantization: Literal["none", "fairy2i", "fairy", "ternary", "binary"] = "none"
    quantization_stages: Annotated[int, Bounds(least=1, most=4)] = 1
    fp8: bool = False
    micro_batch_size: PositiveInt = 8
    balance_weight: NonNegativeFloat = 1e-5
    balance_over: Literal["sequence", "batch"] = "sequence"
    z_weight: NonNegativeFloat = 0.0
    expert_step: ExpertStepConfig = ExpertStepConfig()
    loader_workers: Threads = 0
    log_every_steps: PositiveInt = 10
    expert_trace: bool = False
    evaluation: EvaluationConfig = EvaluationConfig()
    parallel: ParallelConfig = ParallelConfig()


@renamed_keys()
@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """A complete pre-training run.

    Attributes:
        stages: The phases in order.
        model: A preset of `openmimo/model/presets.py`, or the path of a config.json (None: tiny, or the model of
            `init_from`).
        init_from: A checkpoint folder with initial weights (None: random weights).
        tokenizer: Source of the tokenizer.
    """

    stages: tuple[Phase, ...]
    model: str | None = None
    init_from: str | None = None
    _: KW_ONLY
    tokenizer: TokenizerConfig = TokenizerConfig()

    def __post_init__(self) -> None:
        check_fields(self, "the run")
        if not self.stages:
            raise ConfigError("the run has no stages.")
        check_path(self.run_folder, "run_folder")
        check_path(self.init_from, "init_from")
        self.activations.check(checkpointing=self.activation_checkpointing)
        if self.init_from is not None and self.model is not None:
            raise ConfigError(
                f"init_from {self.init_from!r} determines the model, so model {self.model!r} has no effect; omit it "
                "(on the command line: --model None)."
            )
        has_tokenizer = self.init_from is not None or self.tokenizer.path is not None
        if has_tokenizer and self.tokenizer.train_megabytes != TokenizerConfig.train_megabytes:
            raise ConfigError("tokenizer.train_megabytes has no effect on an existing tokenizer; omit it.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float64"):
            raise ConfigError(f"dtype {self.dtype!r} is unknown; train in 'auto', 'bfloat16' or 'float32'.")
        if self.quantization == "none" and self.quantization_stages != 1:
            raise ConfigError("quantization_stages has no effect without quantization; name a packed format.")
        if self.fp8 and self.quantization != "none":
            raise ConfigError(
                f"fp8 and quantization {self.quantization!r} are two arithmetics for the same products; omit one."
            )
        if self.fp8 and self.dtype == "float64":
            raise ConfigError("fp8 sums products in float32, not in dtype 'float64'; omit one of them.")
        if self.fp8 and self.parallel.tp > 1:
            raise ConfigError(
                f"fp8 does not divide the blocks of a weight over parallel.tp {self.parallel.tp} processes; set it to "
                "1. dp_shard, cp and ep work with fp8."
            )
        if self.balance_over == "batch" and not self.balance_weight:
            raise ConfigError("balance_over has no effect without the balance loss; set balance_weight above 0.")
        names = [phase.name for phase in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"two stages share a name: {', '.join(names)}.")


@renamed_keys()
@dataclass(frozen=True)
class ExtendConfig(PhaseSettings, TrainConfig, FromCheckpoint):
    """Context extension of a checkpoint: phase 3 of the report (paper section 3.1).

    Attributes:
        full_rope_theta: New RoPE base of the full-attention layers. The report increases it with the context length.
        full_rope_scaling: Scaling of RoPE in the full-attention layers, such as yarn (none: that of the checkpoint).
    """

    _: KW_ONLY
    full_rope_theta: PositiveFloat
    full_rope_scaling: RopeScaling = RopeScaling()
    bias_rate: NonNegativeFloat = 1e-5
    micro_batch_size: PositiveInt = 1

    def __post_init__(self) -> None:
        check_fields(self, "extend")
        self.as_pretraining()

    def as_pretraining(self) -> PretrainConfig:
        """Return this run as a pre-training run of one phase that starts from the checkpoint. Raises ConfigError."""
        phase = Phase(
            "extend",
            full_rope_theta=self.full_rope_theta,
            full_rope_scaling=self.full_rope_scaling,
            **part_of(self, PhaseSettings),
        )
        return PretrainConfig(stages=(phase,), init_from=self.checkpoint, **part_of(self, TrainConfig))


@renamed_keys()
@dataclass(frozen=True)
class SftConfig(PhaseSettings, TrainConfig, FromCheckpoint):
    """Supervised fine-tuning of a checkpoint on conversations (paper section 4.2; the defaults are the report's).

    Attributes:
        mixture: Sources of demonstrations, such as `chat` (conversations in JSON Lines) and `tasks`. Only assistant
            tokens enter the loss.
    """

    _: KW_ONLY
    mixture: MixtureConfig
    global_batch_size: PositiveInt = 128
    learning_rate: NonNegativeFloat = 5e-5
    end_learning_rate: NonNegativeFloat = 5e-6
    bias_rate: NonNegativeFloat = 1e-4
    balance_weight: NonNegativeFloat = 1e-6

    def __post_init__(self) -> None:
        check_fields(self, "sft")
        self.as_pretraining()

    def as_pretraining(self) -> PretrainConfig:
        """Return this run as a pre-training run of one phase that starts from the checkpoint. Raises ConfigError."""
        phase = Phase("sft", **part_of(self, PhaseSettings))
        return PretrainConfig(stages=(phase,), init_from=self.checkpoint, **part_of(self, TrainConfig))


__getattr__ = renamed_names(__name__, {"Stage": "Phase", "OptimiserConfig": "OptimizerConfig"})
