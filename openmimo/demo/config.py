"""What the demo runs, without torch."""

from dataclasses import dataclass

from openmimo.train.config import ExtendConfig, PretrainConfig


@dataclass(frozen=True)
class DemoConfig:
    """The whole story on a laptop: train, extend, measure, speak.

    Attributes:
        folder: Where results and report go; a finished part is kept, and the same command goes on after a stop.
        pretrain: The first part.
        extend: The second; its checkpoint should be the first one's model.
        retrieval_lengths: Context lengths at which retrieval is measured before and after the extension.
        retrieval_examples: Examples of each length.
        retrieval_pairs: Facts in an example, of which one is asked.
        decode_prompts: Held-out texts that are continued to measure decoding.
        decode_tokens: New tokens of each.
    """

    folder: str
    pretrain: PretrainConfig
    extend: ExtendConfig
    retrieval_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    retrieval_examples: int = 48
    retrieval_pairs: int = 4
    decode_prompts: int = 4
    decode_tokens: int = 192
