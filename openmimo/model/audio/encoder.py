"""The encoder: log-mel frames to states of code frames. B sequences, L mel frames, F code frames, M bands, D dim."""

import torch
import torch.nn.functional as F
from torch import nn

from openmimo.model.audio.attention import AudioLayer, rotation
from openmimo.model.audio.config import AudioTokenizerConfig
from openmimo.model.audio.quantizer import ResidualQuantizer


class AudioEncoder(nn.Module):
    """Two convolutions, attention layers with one skip connection, and a strided convolution; holds the quantizer.

    Args:
        config: The shape.
    """

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        self.config = config
        stack = config.encoder
        self.conv1 = nn.Conv1d(config.mel_bins, stack.dim, config.encoder_kernel, padding=1)
        self.conv2 = nn.Conv1d(stack.dim, stack.dim, config.encoder_kernel, config.encoder_stride, padding=1)
        self.layers = nn.ModuleList(AudioLayer(stack) for _ in range(stack.num_layers))
        self.layer_norm = nn.LayerNorm(stack.dim)
        if config.pooling > 1:
            pool = nn.Conv1d(stack.dim, stack.dim, config.pooling, config.pooling, bias=False)
            self.down_sample_layer = nn.Sequential(pool, nn.GELU())
            self.down_sample_norm = nn.LayerNorm(stack.dim)
        self.quantizer = ResidualQuantizer(config.codebook_sizes, stack.dim, expiry_threshold=config.expiry_threshold)

    def forward(self, mel_BLM: torch.Tensor) -> torch.Tensor:
        """Return states [B, F, D], before quantization. Differentiable."""
        x_BDL = F.gelu(self.conv1(mel_BLM.transpose(1, 2)))
        x_BLD = F.gelu(self.conv2(x_BDL)).transpose(1, 2)
        turn = rotation(self.config.encoder, self.config.rope_theta, range(x_BLD.shape[1]), x_BLD)
        skipped = None
        for number, layer in enumerate(self.layers, start=1):
            x_BLD = layer(x_BLD, turn)
            if number == self.config.skip_layer:
                skipped = x_BLD
        x_BLD = self.layer_norm(x_BLD if skipped is None else x_BLD + skipped)
        if self.config.pooling == 1:
            return x_BLD
        x_BLD = F.pad(x_BLD, (0, 0, 0, -x_BLD.shape[1] % self.config.pooling))
        return self.down_sample_norm(self.down_sample_layer(x_BLD.transpose(1, 2)).transpose(1, 2))
