"""Audio tokenizers in two stages (MiMo-Audio): reconstruction with text, then a decoder against discriminators.

openmimo audio tokenizer audio_tokenizer:tiny     # two CPU cores, minutes
openmimo audio tokenizer audio_tokenizer:released # the shape and the losses of the paper; needs a cluster
"""

from openmimo.train.audio.tokenizer.config import (
    AudioPhase,
    AudioTokenizerTrainConfig,
    DiscriminatorConfig,
    LossWeights,
    QuantizerTraining,
)
from openmimo.train.config import CheckpointConfig, OptimizerConfig

_WEIGHTS = LossWeights(coarse_mel=1.0, commitment=0.25, text=0.3)


def tiny() -> AudioTokenizerTrainConfig:
    """Train `tiny_codec` on one voice."""
    return AudioTokenizerTrainConfig(
        run_folder="runs/audio/tokenizer",
        stages=(
            AudioPhase(
                name="reconstruction", kind="reconstruction", steps=2000, batch_size=8, segment_seconds=1.92,
                learning_rate=2e-3, end_learning_rate=1e-4, warmup_steps=50, weights=_WEIGHTS,
            ),
            AudioPhase(
                name="adversarial", kind="adversarial", steps=300, batch_size=4, segment_seconds=0.96,
                learning_rate=2e-4, end_learning_rate=2e-5, weights=LossWeights(mel=5.0, coarse_mel=1.0),
            ),
        ),
        quantizer=QuantizerTraining(start_step=300),
        discriminators=DiscriminatorConfig(
            periods=(2, 3, 5), stft_samples=(1024, 256), channels=8, max_channels=64
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
            AudioPhase(
                name="reconstruction", kind="reconstruction", steps=1_000_000, batch_size=32, segment_seconds=30.0,
                learning_rate=2e-4, end_learning_rate=2e-5, warmup_steps=5000,
            ),
            AudioPhase(
                name="adversarial", kind="adversarial", steps=500_000, batch_size=32, segment_seconds=2.0,
                learning_rate=2e-4, end_learning_rate=2e-5, warmup_steps=5000,
            ),
        ),
    )  # fmt: skip
