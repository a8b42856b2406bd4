"""The speech demo: an audio tokenizer and a model that transcribes and speaks, on two CPU cores in minutes.

    openmimo audio demo
    openmimo audio tokenizer audio_demo:tokenizer    # its trainings alone
    openmimo audio tokenizer audio_demo:decoder
    openmimo audio language audio_demo:language

The model reads patches of four frames, so a word is two to four positions, and it learns from sentences composed of
recorded words, whose texts are known.
"""

from dataclasses import replace

from openmimo.data.audio.config import CorpusConfig
from openmimo.data.config import MixtureConfig
from openmimo.demo.audio.config import AudioDemoConfig
from openmimo.train.audio.config import AudioPhase, AudioTrainConfig, audio_rows
from openmimo.train.audio.tokenizer.config import AudioTokenizerTrainConfig, LossWeights, TokenizerPhase
from openmimo.train.config import CheckpointConfig, EvaluationConfig
from recipes import audio_tokenizer

CORPUS = "runs/audio/corpus"


def tokenizer() -> AudioTokenizerTrainConfig:
    """The tokenizer of `audio_tokenizer:tiny` in fewer steps."""
    config = audio_tokenizer.tiny()
    stages = (replace(stage, steps=steps) for stage, steps in zip(config.stages, (700, 70), strict=True))
    return replace(config, corpus=CORPUS, stages=tuple(stages))


def decoder() -> AudioTokenizerTrainConfig:
    """The decoder and the vocoder alone, with one scale more: a voice needs more steps than the codes do."""
    config = tokenizer()
    phase = TokenizerPhase(
        name="decoder", kind="adversarial", steps=1300, batch_size=4, segment_seconds=1.44, learning_rate=2e-3,
        end_learning_rate=5e-5, warmup_steps=20,
        weights=LossWeights(coarse_mel=0.2, adversarial=0.0, feature_matching=0.0),
    )  # fmt: skip
    return replace(
        config,
        run_folder="runs/audio/decoder",
        tokenizer=None,
        init_from=f"{config.run_folder}/model",
        stages=(phase,),
        mel_scales=(5, 6, 7, 8),
    )


def language() -> AudioTrainConfig:
    """Transcription and speech of composed sentences, in turn."""
    rows = audio_rows(f"{CORPUS}/train.jsonl", test_path=f"{CORPUS}/heldout.jsonl")
    return AudioTrainConfig(
        run_folder="runs/audio/language",
        codec="runs/audio/decoder/model",
        model="tiny_audio",
        stages=(
            AudioPhase(
                name="hear and speak", steps=400, sequence_length=256, global_batch_size=8, warmup_steps=30,
                learning_rate=3e-3, end_learning_rate=1e-4, mixture=MixtureConfig((rows,)), bias_rate=0.0,
            ),
        ),
        micro_batch_size=8,
        checkpoints=CheckpointConfig(every_steps=200),
        evaluation=EvaluationConfig(every_steps=100, batches=2),
    )  # fmt: skip


def demo() -> AudioDemoConfig:
    """All parts of the demo."""
    return AudioDemoConfig(
        folder="runs/audio", corpus=CorpusConfig(), tokenizer=tokenizer(), decoder=decoder(), language=language()
    )
