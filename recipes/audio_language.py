"""Audio language models at a size that trains on two CPU cores: two stages of pre-training, and fine-tuning.

    openmimo audio data                                  # a corpus in runs/audio/corpus, with rows of each task
    openmimo audio tokenizer audio_tokenizer:tiny        # runs/audio/tokenizer
    openmimo audio language audio_language:pretrain      # understanding, then generation as well
    openmimo audio language audio_language:transcription # and others, from the pre-trained model

Learning rates are in the proportions of MiMo-Audio (arXiv 2512.23808). In the first stage, that of the patch encoder is
6.7 times that of the backbone. In fine-tuning, those of both local parts are five times that of the backbone. The
published rates of the backbone are 3e-5 and 1e-5.
"""

from openmimo.data.config import MixtureConfig
from openmimo.train.audio.config import CODEBOOK_WEIGHTS, AudioPhase, AudioTrainConfig, audio_rows
from openmimo.train.config import CheckpointConfig, EvaluationConfig

FOLDER = "runs/audio"
CODEC = f"{FOLDER}/tokenizer/model"
UNDERSTANDING_ONLY = (0.0,) * 8


def rows(corpus: str = f"{FOLDER}/corpus") -> MixtureConfig:
    """The rows of a corpus; those of `heldout.jsonl` are held out."""
    return MixtureConfig((audio_rows(f"{corpus}/train.jsonl", test_path=f"{corpus}/heldout.jsonl"),))


def pretrain() -> AudioTrainConfig:
    """Stage 1 trains on the text channel only, stage 2 also on the codebooks with weights 12-8-6-4-2-2-1-1."""
    return AudioTrainConfig(
        run_folder=f"{FOLDER}/pretrain",
        codec=CODEC,
        model="tiny_audio",
        stages=(
            AudioPhase(
                name="understanding", steps=400, sequence_length=256, global_batch_size=8, warmup_steps=30,
                learning_rate=1e-3, end_learning_rate=1e-3, encoder_learning_rate=6.7e-3, mixture=rows(),
                codebook_weights=UNDERSTANDING_ONLY, empty_weight=0.0,
            ),
            AudioPhase(
                name="generation", steps=800, sequence_length=256, global_batch_size=8, learning_rate=2e-3,
                end_learning_rate=1e-4, mixture=rows(),
            ),
        ),
        micro_batch_size=8,
        checkpoints=CheckpointConfig(every_steps=200),
        evaluation=EvaluationConfig(every_steps=200, batches=2),
    )  # fmt: skip


def transcription() -> AudioTrainConfig:
    """Fine-tuning on rows that transcribe."""
    return _tuned("transcription", codebook_weights=UNDERSTANDING_ONLY)


def understanding() -> AudioTrainConfig:
    """Fine-tuning on spoken questions; rows with "thinking" true also teach the thoughts."""
    return _tuned("understanding", codebook_weights=UNDERSTANDING_ONLY)


def speech() -> AudioTrainConfig:
    """Fine-tuning on speech synthesis, also by instruction and with the voice of a recording."""
    return _tuned("speech")


def dialogue() -> AudioTrainConfig:
    """Fine-tuning on spoken dialogues."""
    return _tuned("dialogue")


def _tuned(task: str, *, codebook_weights: tuple[float, ...] = CODEBOOK_WEIGHTS) -> AudioTrainConfig:
    """A run on the rows `runs/audio/corpus/TASK/train.jsonl`, from the pre-trained model."""
    phase = AudioPhase(
        name=task, steps=300, sequence_length=256, global_batch_size=8, warmup_steps=10, learning_rate=4e-4,
        end_learning_rate=4e-5, encoder_learning_rate=2e-3, decoder_learning_rate=2e-3,
        mixture=rows(f"{FOLDER}/corpus/{task}"), codebook_weights=codebook_weights,
    )  # fmt: skip
    return AudioTrainConfig(
        run_folder=f"{FOLDER}/tuned_{task}",
        codec=CODEC,
        init_from=f"{FOLDER}/pretrain/model",
        stages=(phase,),
        micro_batch_size=8,
        checkpoints=CheckpointConfig(every_steps=100),
        evaluation=EvaluationConfig(every_steps=100, batches=2),
    )
