"""Initial values of a new tokenizer: the level of each mel band and frequency in the data, and layers that add nothing.

The bands of log-mel spectrograms differ in mean and variance, and an optimizer step changes an offset by about the
learning rate. A run of some hundred steps would spend them on offsets. Layers that add nothing at first let the
convolutions learn alone, which takes fewer steps (docs/log.md).
"""

import torch

from openmimo.model.audio.attention import AudioLayer
from openmimo.model.audio.tokenizer import AudioTokenizer

_SMALLEST_DEVIATION = 0.25
_SMALLEST_MAGNITUDE = 1e-5


@torch.no_grad()
def set_initial_values(tokenizer: AudioTokenizer, waveform_BS: torch.Tensor) -> None:
    """Set the outputs of all layers to zero, and input and outputs of the tokenizer to the data's levels.

    Args:
        tokenizer: A new tokenizer.
        waveform_BS: Segments of training clips.
    """
    for module in tokenizer.modules():
        if isinstance(module, AudioLayer):
            module.self_attn.out_proj.weight.zero_()
            module.fc2.weight.zero_()
    mel_RM = tokenizer.log_mel(waveform_BS).flatten(0, 1)
    mean_M, deviation_M = mel_RM.mean(0), mel_RM.std(0).clamp(min=_SMALLEST_DEVIATION)
    conv = tokenizer.encoder.conv1
    conv.weight.div_(deviation_M[:, None])
    assert conv.bias is not None
    conv.bias.sub_((conv.weight * mean_M[:, None]).sum((1, 2)))

    norm = tokenizer.decoder.dconv2.norm
    norm.weight.copy_(deviation_M)
    norm.bias.copy_(mean_M)

    transform = tokenizer.decoder.vocoder.head.istft
    spectrum_BHL = torch.stft(
        waveform_BS, transform.fft_samples, transform.hop_samples, window=transform.window, return_complex=True
    )
    level_H = spectrum_BHL.abs().clamp(min=_SMALLEST_MAGNITUDE).log().mean((0, 2))
    bias = tokenizer.decoder.vocoder.head.out.bias
    assert bias is not None
    bias[: len(level_H)].copy_(level_H)
