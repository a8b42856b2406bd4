"""Audio tokenizers in two stages (MiMo-Audio): reconstruction with text, then a decoder against discriminators.

openmimo audio tokenizer audio_tokenizer:tiny     # two CPU cores, minutes
openmimo audio tokenizer audio_tokenizer:released # the shape and the losses of the paper; needs a cluster
"""

from openmimo.train.audio.tokenizer.config import (
    AudioTokenizerTrainConfig,
    DiscriminatorConfig,
    LossWeights,
    QuantizerTraining,
    TokenizerPhase,
)
from openmimo.train.config import CheckpointConfig, OptimizerConfig

_WEIGHTS = LossWeights(coarse_mel=1.0, commitment=0.25, text=0.3)


def tiny() -> AudioTokenizerTrainConfig:
    """Train `tiny_codec` on one voice."""
    return AudioTokenizerTrainConfig(
        run_folder="runs/audio/tokenizer",
        stages=(
            TokenizerPhase(
                name="reconstruction", kind="reconstruction", steps=2000, batch_size=3, segment_seconds=1.92,
                learning_rate=2e-3, end_learning_rate=1e-4, warmup_steps=50, weights=_WEIGHTS,
            ),
            TokenizerPhase(
                name="adversarial", kind="adversarial", steps=150, batch_size=3, segment_seconds=0.96,
                learning_rate=3e-4, end_learning_rate=3e-5, weights=LossWeights(mel=5.0, coarse_mel=1.0),
            ),
        ),
        quantizer=QuantizerTraining(start_step=200, decay=0.95),
        discriminators=DiscriminatorConfig(
            periods=(2, 3, 5), stft_samples=(512, 128), channels=4, max_channels=16
        ),
        optimizer=OptimizerConfig(weight_decay=0.01),
        checkpoints=CheckpointConfig(every_steps=500),
    )  # fmt: skip


def released() -> AudioTokenizerTrainConfig:
    """The released shape with the loss weights and scales of the paper, which does not state the learning rates."""
    return AudioTokenizerTrainConfig(
        run_folder="runs/audio/mimo_audio_tokenizer",
        tokenizer="mimo_audio_tokenizer",
        stages=(
            TokenizerPhase(
                name="reconstruction", kind="reconstruction", steps=1_000_000, batch_size=32, segment_seconds=30.0,
                learning_rate=2e-4, end_learning_rate=2e-5, warmup_steps=5000,
            ),
            TokenizerPhase(
                name="adversarial", kind="adversarial", steps=500_000, batch_size=32, segment_seconds=2.0,
                learning_rate=2e-4, end_learning_rate=2e-5, warmup_steps=5000,
            ),
        ),
    )  # fmt: skip
