"""Configs of audio tokenizer training (MiMo-Audio, arXiv 2512.23808), without torch."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

from openmimo.core.errors import ConfigError
from openmimo.core.fields import (
    Bounds,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_fields,
)
from openmimo.model.audio.config import preset
from openmimo.train.config import Decay, RunConfig, check_path

MelScale = Annotated[int, Bounds(least=3, most=10)]


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the losses. The defaults are those of the paper.

    Attributes:
        mel: Multi-scale mel distance of the decoded waveform.
        coarse_mel: Mean distance of the decoder's mel spectrogram to that of the input. The paper has no such loss; it
            saves most of the steps of a small run.
        commitment: Distance of the encoder's states to their codes.
        text: Next-token loss of the text model that reads the codes of a clip, then its transcript.
        adversarial: Generator's loss against the discriminators.
        feature_matching: Distance of the discriminators' features of decoded and real waveforms.
    """

    mel: NonNegativeFloat = 1.0
    coarse_mel: NonNegativeFloat = 0.0
    commitment: NonNegativeFloat = 1.0
    text: NonNegativeFloat = 10.0
    adversarial: NonNegativeFloat = 1.0
    feature_matching: NonNegativeFloat = 2.0

    def __post_init__(self) -> None:
        check_fields(self, "weights")


@dataclass(frozen=True, kw_only=True)
class TokenizerPhase:
    """One stage of the training.

    Attributes:
        name: Name in metrics and plots.
        kind: "reconstruction" trains encoder, codebooks, decoder and text model; "adversarial" trains the decoder
            against discriminators, with encoder and codebooks frozen; where the weights `adversarial` and
            `feature_matching` are 0, there are no discriminators.
        steps: Optimizer steps.
        batch_size: Segments per step.
        segment_seconds: Length of a segment. Shorter clips are padded with silence; parts of longer ones have no text.
        learning_rate: Learning rate after the warm-up.
        end_learning_rate: Learning rate at the end of the cosine decay.
        warmup_steps: Steps of linear warm-up.
        discriminator_learning_rate: Learning rate of the discriminators, which decays in the same proportion.
        weights: Weights of the losses.
    """

    name: str
    kind: Literal["reconstruction", "adversarial"]
    steps: PositiveInt
    batch_size: PositiveInt
    segment_seconds: PositiveFloat
    learning_rate: PositiveFloat
    end_learning_rate: NonNegativeFloat
    warmup_steps: NonNegativeInt = 0
    discriminator_learning_rate: PositiveFloat = 2e-4
    weights: LossWeights = LossWeights()

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        check_fields(self, where)
        if self.end_learning_rate > self.learning_rate or self.warmup_steps > self.steps:
            raise ConfigError(f"{where}: end_learning_rate or warmup_steps is too large.")


@dataclass(frozen=True, kw_only=True)
class QuantizerTraining:
    """How the codebooks start and what the decoder sees of them.

    Attributes:
        start_step: Steps before the codebooks exist; the decoder then gets the encoder's states.
        start_batches: Batches whose states are the vectors of the k-means initialization.
        iterations: Iterations of k-means.
        decay: Decay of the entries' moving averages over batches. A low one lets the entries follow states that change
            fast; the last 1 / (1 - decay) batches should hold several states for each entry.
        partial: Share of the segments that are decoded from a random number of codebooks instead of all, so that the
            first codebooks are useful alone.
    """

    start_step: NonNegativeInt = 0
    start_batches: PositiveInt = 8
    iterations: PositiveInt = 50
    decay: Decay = 0.99
    partial: Fraction = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "quantizer")


@dataclass(frozen=True, kw_only=True)
class TextModelConfig:
    """The text model that is trained from scratch on codes and transcripts; only training uses it.

    Attributes:
        dim: Model dim.
        num_layers: Number of layers.
        num_heads: Attention heads.
        max_bytes: Longer transcripts are left out.
    """

    dim: PositiveInt = 96
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4
    max_bytes: PositiveInt = 200

    def __post_init__(self) -> None:
        check_fields(self, "text_model")


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The discriminators of the second stage.

    Attributes:
        periods: Periods of the multi-period discriminators.
        stft_samples: Lengths of the transforms of the multi-scale discriminators; the hop is a quarter.
        channels: Channels of the first convolution.
        max_channels: Channels are doubled per convolution up to this number.
    """

    periods: tuple[PositiveInt, ...] = (2, 3, 5, 7, 11)
    stft_samples: tuple[PositiveInt, ...] = (2048, 1024, 512, 256, 128)
    channels: PositiveInt = 32
    max_channels: PositiveInt = 512

    def __post_init__(self) -> None:
        check_fields(self, "discriminators")
        if not self.periods or not self.stft_samples:
            raise ConfigError("discriminators: give at least one period and one transform.")


@dataclass(frozen=True)
class AudioTokenizerTrainConfig(RunConfig):
    """A complete training run of an audio tokenizer. Its result is the tokenizer folder `<run_folder>/model`.

    Attributes:
        corpus: Folder with `clips.jsonl`, which `openmimo audio data` writes.
        stages: The stages in order.
        tokenizer: A preset of `openmimo/model/audio/config.py`.
        init_from: A tokenizer folder with initial weights (None: random weights).
        mel_scales: Scale i has 2^i bands, windows of 15 * 2^(i-1) samples, and hops of half a window.
        quantizer: Start of the codebooks.
        text_model: The text model.
        discriminators: The discriminators.
        log_every_steps: Steps between lines of metrics.
        evaluate_every_steps: Steps between evaluations on held-out clips.
        evaluation_clips: Number of held-out segments.
    """

    corpus: str = "runs/audio/corpus"
    _: KW_ONLY
    stages: tuple[TokenizerPhase, ...]
    tokenizer: str | None = "tiny_codec"
    init_from: str | None = None
    mel_scales: tuple[MelScale, ...] = (5, 6, 7)
    quantizer: QuantizerTraining = QuantizerTraining()
    text_model: TextModelConfig = TextModelConfig()
    discriminators: DiscriminatorConfig = DiscriminatorConfig()
    log_every_steps: PositiveInt = 10
    evaluate_every_steps: PositiveInt = 200
    evaluation_clips: PositiveInt = 16

    def __post_init__(self) -> None:
        check_fields(self, "the run")
        check_path(self.run_folder, "run_folder")
        check_path(self.init_from, "init_from")
        if not self.stages:
            raise ConfigError("the run has no stages.")
        names = [phase.name for phase in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"two stages share a name: {', '.join(names)}.")
        if (self.tokenizer is None) == (self.init_from is None):
            raise ConfigError("give either tokenizer (a preset) or init_from (a folder); the other must be None.")
        if self.tokenizer is not None:
            preset(self.tokenizer)
        if self.dtype not in ("auto", "float32"):
            raise ConfigError(f"dtype {self.dtype!r} is not supported; the tokenizer is trained in float32.")
        for name in ("activation_checkpointing", "activations"):
            if getattr(self, name) != getattr(RunConfig, name):
                raise ConfigError(f"{name} has no effect on the training of a tokenizer; leave it out.")
        first = self.stages[0]
        if self.init_from is None and first.kind == "adversarial":
            raise ConfigError(f"stage {first.name!r} is adversarial, but the codebooks are untrained; set init_from.")
        if self.init_from is None and self.quantizer.start_step >= first.steps:
            raise ConfigError(
                f"quantizer.start_step {self.quantizer.start_step} must be below the {first.steps} steps of the first "
                "stage."
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def place_of(self, step: int) -> tuple[TokenizerPhase, int]:
        """Return the stage of a step (from 0) of the run, and the step in the stage."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        return self.stages[-1], step + self.stages[-1].steps
