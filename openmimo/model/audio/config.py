"""Shape of an audio tokenizer, without torch; presets, and the keys of the released `config.json`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check_fields
from openmimo.core.files import read_known_keys

DecoderNorm = Literal["sequence", "frame"]
SampleRate = Annotated[int, Bounds(least=1000, most=384_000)]
Layers = Annotated[int, Bounds(least=1, most=256)]
Size = Annotated[int, Bounds(least=1, most=1 << 16)]
CodebookSize = Annotated[int, Bounds(least=2, most=1 << 20)]
_UNLIMITED = -1  # in the windows of a released config.json


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of attention layers.

    Attributes:
        dim: Width of the states.
        num_layers: Number of layers.
        num_heads: Attention heads; each has a key and a value head of its own.
        ffn_dim: Hidden width of the feed-forward networks.
        left_positions: Earlier positions that a position sees (None: all).
        right_positions: Later positions that a position sees (None: all; 0: causal).
    """

    dim: Size
    num_layers: Layers
    num_heads: Size
    ffn_dim: Size
    left_positions: NonNegativeInt | None = None
    right_positions: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        check_fields(self, "stack")
        if self.dim % (2 * self.num_heads):
            raise ConfigError(
                f"a stack of dim {self.dim} has {self.num_heads} heads; a head must have an even, whole size."
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class AudioTokenizerConfig:
    """A tokenizer of MiMo-Audio: log-mel, encoder, residual vector quantizer, decoder, vocoder.

    Attributes:
        encoder: The encoder's layers, after a convolution of stride `encoder_stride`.
        decoder: The decoder's layers, of the encoder's width.
        vocoder: The vocoder's layers, one position for each frame of the mel spectrogram.
        codebook_sizes: Number of entries of each codebook, in the order of the residuals.
        sample_rate: Samples per second.
        fft_samples: Length of a Fourier transform; the vocoder's window has the same length.
        window_samples: Length of the analysis window.
        hop_samples: Samples between frames of the mel spectrogram.
        mel_bins: Bands of the mel spectrogram.
        lowest_frequency: Lower edge of the first band, in hertz.
        highest_frequency: Upper edge of the last band, in hertz (None: half the sample rate).
        mel_floor: Magnitudes of bands below this are raised to it (released: 1e-7). Digital silence then differs from
            speech by more than sounds differ from each other.
        mel_center: Subtracted from log-mel spectrograms, whose values are around -8 (released: 0).
        mel_scale: Divides log-mel spectrograms after that (released: 1).
        skip_layer: The output of this layer (from 1) is added to that of the last encoder layer (None: nothing is).
        encoder_kernel: Kernel size of the two convolutions of the encoder.
        encoder_stride: Stride of the second of them.
        pooling: Encoder positions per code frame.
        decoder_kernel: Kernel size of the transposed convolution that ends the decoder.
        decoder_stride: Its stride.
        decoder_norm: Statistics of the norms in the decoder's transposed convolutions: of the whole "sequence", as in
            the released tokenizer, or of each "frame", which makes the decoder causal. The last norm then has none,
            because its output is the mel spectrogram, whose level differs from frame to frame.
        rope_theta: Base of the rotary positions.
        expiry_threshold: A code whose average use per training batch is below this is replaced (0: never).
        max_seconds: Longest audio of the released tokenizer, which is only recorded.
    """

    encoder: StackConfig
    decoder: StackConfig
    vocoder: StackConfig
    codebook_sizes: tuple[CodebookSize, ...]
    sample_rate: SampleRate = 24_000
    fft_samples: Size = 960
    window_samples: Size = 960
    hop_samples: Size = 240
    mel_bins: Size = 128
    lowest_frequency: NonNegativeFloat = 0.0
    highest_frequency: PositiveFloat | None = None
    mel_floor: PositiveFloat = 1e-7
    mel_center: float = 0.0
    mel_scale: PositiveFloat = 1.0
    skip_layer: PositiveInt | None = None
    encoder_kernel: Size = 3
    encoder_stride: Size = 2
    pooling: Size = 2
    decoder_kernel: Size = 3
    decoder_stride: Size = 2
    decoder_norm: DecoderNorm = "sequence"
    rope_theta: PositiveFloat = 10_000.0
    expiry_threshold: NonNegativeFloat = 2.0
    max_seconds: PositiveInt = 1800

    def __post_init__(self) -> None:
        where = "audio tokenizer"
        check_fields(self, where)
        if not self.codebook_sizes:
            raise ConfigError(f"{where}: codebook_sizes is empty; give the size of at least one codebook.")
        if self.encoder.dim != self.decoder.dim:
            raise ConfigError(f"{where}: encoder.dim {self.encoder.dim} and decoder.dim {self.decoder.dim} differ.")
        if self.skip_layer is not None and self.skip_layer > self.encoder.num_layers:
            raise ConfigError(f"{where}: skip_layer {self.skip_layer} is above the {self.encoder.num_layers} layers.")
        if self.encoder_kernel != 3 or self.decoder_kernel < self.decoder_stride:
            raise ConfigError(f"{where}: encoder_kernel must be 3, and decoder_kernel at least decoder_stride.")
        if self.encoder_stride != self.decoder_stride:
            raise ConfigError(
                f"{where}: encoder_stride {self.encoder_stride} and decoder_stride {self.decoder_stride} differ, so "
                "decoded audio would have another length."
            )
        if self.window_samples > self.fft_samples or (self.fft_samples - self.hop_samples) % 2:
            raise ConfigError(f"{where}: window_samples must not exceed fft_samples, and fft - hop must be even.")
        if 2 * self.hop_samples > self.fft_samples:
            raise ConfigError(f"{where}: hop_samples {self.hop_samples} is above half of fft_samples.")
        if not self.lowest_frequency < self.highest_mel_frequency <= self.sample_rate / 2:
            raise ConfigError(f"{where}: the mel bands do not lie between 0 and half the sample rate.")

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks."""
        return len(self.codebook_sizes)

    @property
    def mel_frames_per_frame(self) -> int:
        """Mel frames per code frame."""
        return self.encoder_stride * self.pooling

    @property
    def samples_per_frame(self) -> int:
        """Samples per code frame."""
        return self.hop_samples * self.mel_frames_per_frame

    @property
    def frames_per_second(self) -> float:
        """Code frames per second."""
        return self.sample_rate / self.samples_per_frame

    @property
    def highest_mel_frequency(self) -> float:
        """Upper edge of the last mel band, in hertz."""
        return self.sample_rate / 2 if self.highest_frequency is None else self.highest_frequency

    def frames_of_mel(self, mel_frames: int) -> int:
        """Return the number of code frames of a mel spectrogram."""
        positions = (mel_frames - 1) // self.encoder_stride + 1
        return -(-positions // self.pooling)


def mimo_audio_tokenizer() -> AudioTokenizerConfig:
    """Return the released MiMo-Audio tokenizer: 1.29 billion parameters, 20 codebooks, 25 frames per second."""
    layers = StackConfig(dim=1280, num_layers=32, num_heads=20, ffn_dim=5120)
    return AudioTokenizerConfig(
        encoder=layers,
        decoder=replace(layers, right_positions=0),
        vocoder=StackConfig(
            dim=256, num_layers=16, num_heads=16, ffn_dim=1024, left_positions=40, right_positions=10
        ),
        codebook_sizes=(1024, 1024, *[128] * 18),
        skip_layer=3,
    )  # fmt: skip


def tiny_codec() -> AudioTokenizerConfig:
    """Return a tokenizer of 1.2 million parameters that trains on two CPU cores in minutes: 8 codebooks."""
    layers = StackConfig(dim=96, num_layers=2, num_heads=4, ffn_dim=384)
    return AudioTokenizerConfig(
        encoder=layers,
        decoder=replace(layers, left_positions=100, right_positions=0),
        vocoder=StackConfig(dim=128, num_layers=2, num_heads=4, ffn_dim=512, left_positions=16, right_positions=4),
        codebook_sizes=(256, 256, *[128] * 6),
        mel_floor=1e-3,
        mel_center=-2.0,
        mel_scale=3.0,
        skip_layer=1,
        decoder_norm="frame",
        expiry_threshold=0.1,  # a small batch has 200 frames, less than one for each entry
    )


AUDIO_TOKENIZER_PRESETS: dict[str, Callable[[], AudioTokenizerConfig]] = {
    "tiny_codec": tiny_codec,
    "mimo_audio_tokenizer": mimo_audio_tokenizer,
}


def preset(name: str) -> AudioTokenizerConfig:
    """Return the config with this name. Raises ConfigError if there is none."""
    if name not in AUDIO_TOKENIZER_PRESETS:
        raise ConfigError(f"there is no audio tokenizer {name!r}; there are {', '.join(AUDIO_TOKENIZER_PRESETS)}.")
    return AUDIO_TOKENIZER_PRESETS[name]()


Window = tuple[Annotated[int, Bounds(least=-1)], Annotated[int, Bounds(least=-1)]]
# Keys of transformers, and one that the released code computes but does not use.
_INERT_KEYS = {
    "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
    "scale_embedding", "openmimo_version",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _ReleasedKeys:
    """The keys of the released `config.json`. Keys without a default determine shapes, so they must be present."""

    d_model: Size
    encoder_layers: Layers
    encoder_attention_heads: Size
    encoder_ffn_dim: Size
    encoder_skip_layer_id: PositiveInt | None = None
    encoder_causal: bool = False
    encoder_attn_window_size: Window | None = None
    decoder_layers: Layers
    decoder_attention_heads: Size
    decoder_ffn_dim: Size
    decoder_kernel_size: Size = 3
    decoder_stride_size: Size = 2
    decoder_causal: bool = True
    decoder_attn_window_size: Window | None = None
    vocoder_dim: Size
    vocoder_intermediate_dim: Size
    vocoder_num_layers: Layers
    vocoder_attention_heads: Size
    vocoder_attn_window_size: Window | None = (40, 10)
    vocoder_padding: Literal["same"] = "same"
    num_quantizers: Layers
    codebook_size: tuple[CodebookSize, ...]
    threshold_ema_dead_code: NonNegativeFloat = 2.0
    n_mels: Size
    nfft: Size
    window_size: Size
    hop_length: Size
    sampling_rate: SampleRate
    fmin: NonNegativeFloat = 0.0
    fmax: PositiveFloat | None = None
    kernel_size: Size = 3
    stride_size: Size = 2
    avg_pooler: Size
    activation_function: Literal["gelu"] = "gelu"
    ln_type: Literal["LayerNorm"] = "LayerNorm"
    position_embedding_type: Literal["rope"] = "rope"
    rope_type: Literal["default"] = "default"
    rope_theta: PositiveFloat = 10_000.0
    max_audio_seconds: PositiveInt = 1800
    openmimo_decoder_norm: DecoderNorm = "sequence"
    openmimo_mel_floor: PositiveFloat = 1e-7
    openmimo_mel_center: float = 0.0
    openmimo_mel_scale: PositiveFloat = 1.0


def config_from_released(values: Any, where: str) -> AudioTokenizerConfig:
    """Return the config of a released `config.json`.

    The defaults of the published Python class are not the released values, so keys that determine shapes must be
    present.

    Args:
        values: The parsed file.
        where: Its name, for messages.

    Raises:
        ConfigError: A key is unknown, missing or invalid.
    """
    keys = read_known_keys(_ReleasedKeys, values, where, inert=_INERT_KEYS)
    sizes = keys.codebook_size
    if len(sizes) > keys.num_quantizers or not sizes:
        raise ConfigError(f"{where}: codebook_size has {len(sizes)} sizes for {keys.num_quantizers} quantizers.")
    sizes = (*sizes, *[sizes[-1]] * (keys.num_quantizers - len(sizes)))
    parts = ("encoder", "decoder")
    encoder, decoder = (
        _stack(
            keys.d_model,
            *(getattr(keys, f"{part}_{key}") for key in ("layers", "attention_heads", "ffn_dim")),
            window=getattr(keys, f"{part}_attn_window_size"),
            causal=getattr(keys, f"{part}_causal"),
        )
        for part in parts
    )
    return AudioTokenizerConfig(
        encoder=encoder,
        decoder=decoder,
        vocoder=_stack(
            keys.vocoder_dim,
            keys.vocoder_num_layers,
            keys.vocoder_attention_heads,
            keys.vocoder_intermediate_dim,
            window=keys.vocoder_attn_window_size,
            causal=False,
        ),
        codebook_sizes=sizes,
        sample_rate=keys.sampling_rate,
        fft_samples=keys.nfft,
        window_samples=keys.window_size,
        hop_samples=keys.hop_length,
        mel_bins=keys.n_mels,
        lowest_frequency=keys.fmin,
        highest_frequency=keys.fmax,
        mel_floor=keys.openmimo_mel_floor,
        mel_center=keys.openmimo_mel_center,
        mel_scale=keys.openmimo_mel_scale,
        skip_layer=keys.encoder_skip_layer_id,
        encoder_kernel=keys.kernel_size,
        encoder_stride=keys.stride_size,
        pooling=keys.avg_pooler,
        decoder_kernel=keys.decoder_kernel_size,
        decoder_stride=keys.decoder_stride_size,
        decoder_norm=keys.openmimo_decoder_norm,
        rope_theta=keys.rope_theta,
        expiry_threshold=keys.threshold_ema_dead_code,
        max_seconds=keys.max_audio_seconds,
    )


def config_to_released(config: AudioTokenizerConfig) -> dict[str, Any]:
    """Return the released keys of a config; the inverse of `config_from_released`."""
    values: dict[str, Any] = {
        "architectures": ["MiMoAudioTokenizer"],
        "model_type": "mimo_audio_tokenizer",
        "d_model": config.encoder.dim,
        "vocoder_dim": config.vocoder.dim,
        "vocoder_intermediate_dim": config.vocoder.ffn_dim,
        "vocoder_num_layers": config.vocoder.num_layers,
        "vocoder_attention_heads": config.vocoder.num_heads,
        "vocoder_attn_window_size": _window(config.vocoder),
        "vocoder_padding": "same",
        "encoder_skip_layer_id": config.skip_layer,
        "num_quantizers": config.num_codebooks,
        "codebook_size": list(config.codebook_sizes),
        "threshold_ema_dead_code": _whole(config.expiry_threshold),
        "n_mels": config.mel_bins,
        "nfft": config.fft_samples,
        "window_size": config.window_samples,
        "hop_length": config.hop_samples,
        "sampling_rate": config.sample_rate,
        "fmin": _whole(config.lowest_frequency),
        "fmax": None if config.highest_frequency is None else _whole(config.highest_frequency),
        "kernel_size": config.encoder_kernel,
        "stride_size": config.encoder_stride,
        "avg_pooler": config.pooling,
        "decoder_kernel_size": config.decoder_kernel,
        "decoder_stride_size": config.decoder_stride,
        "activation_function": "gelu",
        "ln_type": "LayerNorm",
        "position_embedding_type": "rope",
        "rope_type": "default",
        "rope_theta": _whole(config.rope_theta),
        "max_audio_seconds": config.max_seconds,
        "scale_embedding": False,
    }
    for part, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        values |= {
            f"{part}_layers": stack.num_layers,
            f"{part}_attention_heads": stack.num_heads,
            f"{part}_ffn_dim": stack.ffn_dim,
            f"{part}_causal": stack.right_positions == 0,
            f"{part}_attn_window_size": _window(stack),
        }
    own = {
        "openmimo_decoder_norm": config.decoder_norm,
        "openmimo_mel_floor": config.mel_floor,
        "openmimo_mel_center": config.mel_center,
        "openmimo_mel_scale": config.mel_scale,
    }
    values |= {key: value for key, value in own.items() if value != getattr(_ReleasedKeys, key)}
    return values


def _stack(dim: int, layers: int, heads: int, ffn_dim: int, *, window: Window | None, causal: bool) -> StackConfig:
    left, right = (None if side == _UNLIMITED else side for side in window or (_UNLIMITED, _UNLIMITED))
    return StackConfig(
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        ffn_dim=ffn_dim,
        left_positions=left,
        right_positions=0 if causal else right,
    )


def _window(stack: StackConfig) -> list[int]:
    """Return the window of a stack in the released form; a causal stack has the right side of the mask."""
    return [_UNLIMITED if side is None else side for side in (stack.left_positions, stack.right_positions)]


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number
