"""What the demo runs, without torch."""

from dataclasses import dataclass

from openmimo.rl.config import CompareConfig, MopdConfig, RlConfig
from openmimo.train.config import ExtendConfig, PretrainConfig, SftConfig


@dataclass(frozen=True)
class DemoConfig:
    """The whole story on a laptop: train, extend, fine-tune, teach, distil, measure, speak.

    Every part is a run of its own command, and starts from the model that the one before it leaves.

    Attributes:
        folder: Where results and report go; a finished part is kept, and the same command goes on after a stop.
        pretrain: The first part.
        extend: The second.
        sft: The third: demonstrations of several tasks.
        teachers: Then one run of reinforcement learning for each domain, several at a time if there are cores.
        mopd: One student of all of them.
        compare: Base, teachers and student in every domain.
        retrieval_lengths: Context lengths at which retrieval is measured before and after the extension.
        retrieval_examples: Examples of each length.
        retrieval_pairs: Facts in an example, of which one is asked.
        decode_prompts: Held-out texts (and, after post-training, problems) that are answered to measure decoding.
        decode_tokens: New tokens of each text.
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
