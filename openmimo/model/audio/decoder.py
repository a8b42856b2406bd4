"""The decoder: vectors of code frames to a coarse mel spectrogram, causally.

B sequences, F code frames, L positions or mel frames, D dim, M bands.
"""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from openmimo.model.audio.attention import AudioLayer, LayerStream, rotation
from openmimo.model.audio.config import AudioTokenizerConfig
from openmimo.model.audio.vocoder import Vocoder

Statistics: TypeAlias = Literal["sequence", "frame", "none"]


class Moments:
    """Number, sum and sum of squares of all values that a streamed norm has seen."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, x: torch.Tensor) -> tuple[float, float]:
        """Add values. Returns the mean and the variance of all so far."""
        x = x.double()
        self.count, self.sum, self.squares = (
            self.count + x.numel(), self.sum + float(x.sum()), self.squares + float(x.pow(2).sum()),
        )  # fmt: skip
        mean = self.sum / self.count
        return mean, max(self.squares / self.count - mean * mean, 0.0)


class ChannelNorm(nn.Module):
    """A norm over the channels of a frame, or over the channels and frames of a sequence (a group norm of one group).

    Args:
        dim: Number of channels.
        statistics: Of each "frame", of the "sequence", or "none": only the channels' scales and offsets remain.
        epsilon: Added to the variance.
    """

    def __init__(self, dim: int, statistics: Statistics, epsilon: float = 1e-5):
        super().__init__()
        self.statistics, self.epsilon = statistics, epsilon
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x_BLD: torch.Tensor, moments: Moments | None = None) -> torch.Tensor:
        """Return normalized states.

        Args:
            x_BLD: The states.
            moments: Of a stream whose next states these are. A norm over the sequence then uses the statistics of the
                sequence so far.
        """
        if self.statistics == "none":
            return x_BLD * self.weight + self.bias
        if self.statistics == "frame":
            return F.layer_norm(x_BLD, x_BLD.shape[-1:], self.weight, self.bias, self.epsilon)
        if moments is None:
            return F.group_norm(x_BLD.transpose(1, 2), 1, self.weight, self.bias, self.epsilon).transpose(1, 2)
        mean, variance = moments.add(x_BLD)
        return (x_BLD - mean) * (variance + self.epsilon) ** -0.5 * self.weight + self.bias


class UpsamplingConv(nn.Module):
    """A transposed convolution that is causal: what reaches behind the last input is dropped.

    Args:
        dim: Input width.
        out_dim: Output width.
        kernel: Kernel size.
        stride: Outputs per input.
        statistics: See `ChannelNorm`.
    """

    def __init__(self, dim: int, out_dim: int, kernel: int, stride: int, statistics: Statistics):
        super().__init__()
        self.conv = nn.ConvTranspose1d(dim, out_dim, kernel, stride)
        self.norm = ChannelNorm(out_dim, statistics)
        self.stride = stride
        self.num_earlier = -(-(kernel - stride) // stride)  # inputs before the first one that reach its outputs

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Return the outputs of whole sequences, `stride` times as many as inputs."""
        # The released tokenizer normalizes before it drops, so the dropped outputs are in the statistics.
        out = self.norm(self.conv(x_BLD.transpose(1, 2)).transpose(1, 2))
        return out[:, : x_BLD.shape[1] * self.stride]

    def push(self, x_BLD: torch.Tensor, earlier_BLD: torch.Tensor, moments: Moments) -> torch.Tensor:
        """Return the outputs of the next inputs of a stream, after its last `num_earlier` inputs."""
        joined = torch.cat([earlier_BLD, x_BLD], dim=1)
        out = self.conv(joined.transpose(1, 2)).transpose(1, 2)
        return self.norm(out[:, earlier_BLD.shape[1] * self.stride : joined.shape[1] * self.stride], moments)


class AudioDecoder(nn.Module):
    """Transposed convolution, causal layers, transposed convolution; holds the vocoder.

    Args:
        config: The shape.
    """

    def __init__(self, config: AudioTokenizerConfig):
        super().__init__()
        self.config = config
        stack, norm = config.decoder, config.decoder_norm
        last_norm: Statistics = "none" if norm == "frame" else norm
        if config.pooling > 1:
            self.dconv1 = UpsamplingConv(stack.dim, stack.dim, config.pooling, config.pooling, norm)
        self.layers = nn.ModuleList(AudioLayer(stack) for _ in range(stack.num_layers))
        self.layer_norm = nn.LayerNorm(stack.dim)
        self.dconv2 = UpsamplingConv(
            stack.dim, config.mel_bins, config.decoder_kernel, config.decoder_stride, last_norm
        )
        self.vocoder = Vocoder(config)

    @property
    def upsampling(self) -> "list[UpsamplingConv]":
        """The transposed convolutions in order."""
        return [self.dconv1, self.dconv2] if self.config.pooling > 1 else [self.dconv2]

    def coarse_mel(self, x_BFD: torch.Tensor) -> torch.Tensor:
        """Return a coarse log-mel spectrogram [B, L, M] of vectors. Differentiable."""
        x_BLD = self.dconv1(x_BFD) if self.config.pooling > 1 else x_BFD
        turn = rotation(self.config.decoder, self.config.rope_theta, range(x_BLD.shape[1]), x_BLD)
        for layer in self.layers:
            x_BLD = layer(x_BLD, turn)
        return self.dconv2(self.layer_norm(x_BLD))

    def forward(self, x_BFD: torch.Tensor) -> torch.Tensor:
        """Return waveforms [B, S] of vectors [B, F, D]. Differentiable."""
        return self.vocoder(self.coarse_mel(x_BFD))


class DecoderStream:
    """The decoder of one stream, up to the coarse mel spectrogram.

    Args:
        decoder: The decoder.

    Raises:
        ConfigError: The decoder is not causal.
    """

    def __init__(self, decoder: AudioDecoder):
        config = decoder.config
        self._decoder = decoder
        self._layers = LayerStream(decoder.layers, config.decoder, config.rope_theta)
        self._moments = [Moments() for _ in decoder.upsampling]
        self._earlier: list[torch.Tensor | None] = [None for _ in decoder.upsampling]

    def push(self, x_BFD: torch.Tensor, *, last: bool = False) -> torch.Tensor:
        """Return the mel frames [1, L, M] that the next vectors [1, F, D] complete."""
        x = x_BFD
        if self._decoder.config.pooling > 1:
            x = self._upsample(0, x)
        x = self._decoder.layer_norm(self._layers.push(x, last=last))
        return self._upsample(-1, x)

    def _upsample(self, index: int, x_BLD: torch.Tensor) -> torch.Tensor:
        conv, earlier = self._decoder.upsampling[index], self._earlier[index]
        if x_BLD.shape[1] == 0:
            return x_BLD.new_empty(1, 0, conv.conv.out_channels)
        earlier = x_BLD[:, :0] if earlier is None else earlier
        out = conv.push(x_BLD, earlier, self._moments[index])
        joined = torch.cat([earlier, x_BLD], dim=1)
        self._earlier[index] = joined[:, joined.shape[1] - min(conv.num_earlier, joined.shape[1]) :]
        return out
