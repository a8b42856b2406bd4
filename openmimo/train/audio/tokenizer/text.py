"""The text model of the first stage: it reads the codes of a clip and predicts the bytes of its transcript.

Its loss makes the codes hold what is said and not only how it sounds. It is trained from scratch, and dropped after.

B clips, F code frames, D tokenizer dim, T packed positions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from openmimo.model.attention import AttentionConfig
from openmimo.model.config import LayerConfig, ModelConfig
from openmimo.model.context import PackedContext
from openmimo.model.layers import Linear
from openmimo.model.mimo import MiMo
from openmimo.train.audio.tokenizer.config import TextModelConfig

_START, _END, _VOCABULARY = 256, 257, 258  # after the bytes
_FFN_RATIO = 3


class TextModel(nn.Module):
    """A decoder-only model over projected codes and bytes.

    Args:
        config: Its shape.
        audio_dim: Width of the codes' vectors.
        generator: Draws the initial weights.
    """

    def __init__(self, config: TextModelConfig, audio_dim: int, generator: torch.Generator):
        super().__init__()
        self.config = config
        self.projection = Linear(audio_dim, config.dim)
        self.model = MiMo(_model_config(config))
        self.model.initialize(generator)

    def forward(self, audio_BFD: torch.Tensor, texts: Sequence[str | None]) -> torch.Tensor | None:
        """Return the mean loss per byte in nats; None if no clip has a usable text.

        Args:
            audio_BFD: Vectors of the codes, whose gradient reaches the encoder.
            texts: The transcript of each clip; None for clips without.
        """
        usable = [
            (index, text.encode())
            for index, text in enumerate(texts)
            if text and len(text.encode()) <= self.config.max_bytes
        ]
        if not usable:
            return None
        parts: list[torch.Tensor] = []
        is_label, labels, lengths = [], [], []
        projected_BFD = self.projection(audio_BFD)
        frames = audio_BFD.shape[1]
        for index, text in usable:
            tokens = torch.tensor([_START, *text], device=audio_BFD.device)
            parts += [projected_BFD[index], self.model.model.embed_tokens(tokens, audio_BFD.dtype)]
            labels += [*text, _END]
            is_label += [False] * frames + [True] * len(tokens)
            lengths.append(frames + len(tokens))
        context = PackedContext(tuple(lengths), device=audio_BFD.device)
        states_TD = self.model.model(torch.cat(parts), context).post_norm_TD
        logits = self.model.head(states_TD[torch.tensor(is_label, device=states_TD.device)])
        return F.cross_entropy(logits, torch.tensor(labels, device=logits.device))


def _model_config(config: TextModelConfig) -> ModelConfig:
    head_dim = config.dim // config.num_heads
    attention = AttentionConfig(
        "full", num_heads=config.num_heads, num_kv_heads=config.num_heads, key_dim=head_dim, value_dim=head_dim,
        rotary_dim=head_dim, rope_theta=1e4,
    )  # fmt: skip
    return ModelConfig(
        vocab_size=_VOCABULARY,
        hidden_size=config.dim,
        dense_ffn_dim=_FFN_RATIO * config.dim,
        layers=(LayerConfig(attention=attention, ffn="dense"),) * config.num_layers,
        init_std=config.dim**-0.5 / 2,
        max_positions=4096,
    )
