"""Configuration of the demo, and of a chain of runs on one device. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, PositiveInt, check_fields
from openmimo.rl.config import CompareConfig, MopdConfig, RlConfig
from openmimo.train.config import ExtendConfig, PretrainConfig, SftConfig

MAX_MINUTES = 60.0 * 24 * 365


@dataclass(frozen=True)
class DemoConfig:
    """Run all training commands and measurements of the demo.

    Each training part is a run of its own command and starts from the model of an earlier part.

    Attributes:
        folder: Folder of results and report. Finished parts are kept, and the same command resumes an interrupted demo.
        pretrain: Pre-training.
        extend: Context extension of the pre-trained model.
        sft: Fine-tuning of the extended model on demonstrations of several tasks.
        teachers: Reinforcement learning from the fine-tuned model, one run per domain, in parallel if there are cores.
        mopd: Distillation of all teachers into one student.
        compare: Evaluation of base, teachers and student in every domain.
        retrieval_lengths: Context lengths of the retrieval evaluation before and after the extension.
        retrieval_examples: Examples per length.
        retrieval_pairs: Facts per example, one of which is queried.
        decode_prompts: Number of held-out texts, and of problems per domain, from which decoding is measured.
        decode_tokens: New tokens per text.
    """

    folder: str
    pretrain: PretrainConfig
    extend: ExtendConfig
    sft: SftConfig
    teachers: tuple[RlConfig, ...]
    mopd: MopdConfig
    compare: CompareConfig
    retrieval_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    retrieval_examples: int = 48
    retrieval_pairs: int = 4
    decode_prompts: int = 4
    decode_tokens: int = 192


@dataclass(frozen=True)
class ChainConfig:
    """Train a model from random weights to a student of several teachers, in pieces of a few minutes.

    Every part is a run of its own command and starts from the model of an earlier part.

    Attributes:
        folder: Folder of results and report. Finished parts are kept, and the same command goes on with the others.
        pretrain: Pre-training.
        extend: Context extension of the pre-trained model.
        sft: Fine-tuning of the extended model on demonstrations.
        teachers: Reinforcement learning from the fine-tuned model, one run per domain, one after another.
        mopd: Distillation of all teachers into one student.
        compare: Evaluation of base, teachers and student in every domain. Its teachers, students and base are names
            and folders of the runs above.
        minutes: End after this time, at the end of a step, with a checkpoint (0: run to the end).
        gap_steps: Steps of the first teacher's run from which the gap of trainer and engine is measured, once with the
            engine's routes and once without.
    """

    folder: str
    pretrain: PretrainConfig
    extend: ExtendConfig
    sft: SftConfig
    teachers: tuple[RlConfig, ...]
    mopd: MopdConfig
    compare: CompareConfig
    minutes: Annotated[float, Bounds(least=0.0, most=MAX_MINUTES)] = 0.0
    gap_steps: PositiveInt = 4

    def __post_init__(self) -> None:
        check_fields(self, "chain")
        if not self.teachers:
            raise ConfigError("the chain has no teachers, so there is nothing to distill.")
        folders = [run.run_folder for run in (self.pretrain, self.extend, self.sft, *self.teachers, self.mopd)]
        if len(set(folders)) != len(folders):
            raise ConfigError(f"two runs of the chain share a run_folder: {', '.join(folders)}.")
