"""MiMo-Audio's tokenizer from its equations, in float64, for one sequence: the oracle of the tests of `model/audio`.

It reads a state dict with the released names and the released keys of `config.json`. It shares no code with the package
and is slow: sums over kernel positions, attention with a complete matrix, transforms as products with a DFT matrix.
"""

import math
from typing import Any

import torch

State = dict[str, torch.Tensor]


def small_keys(**changes: Any) -> dict[str, Any]:
    """The released keys of a small tokenizer: 2,400 samples and 25 frames per second, three codebooks."""
    return {
        "max_audio_seconds": 1800, "stride_size": 2, "avg_pooler": 2, "d_model": 32, "scale_embedding": False,
        "kernel_size": 3, "activation_function": "gelu", "encoder_layers": 3, "encoder_skip_layer_id": 2,
        "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "encoder_causal": False,
        "encoder_attn_window_size": [-1, -1], "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
        "decoder_kernel_size": 3, "decoder_stride_size": 2, "decoder_causal": True,
        "decoder_attn_window_size": [-1, -1], "nfft": 96, "vocoder_dim": 16, "vocoder_intermediate_dim": 32,
        "vocoder_num_layers": 2, "vocoder_attention_heads": 2, "vocoder_attn_window_size": [6, 3], "n_mels": 20,
        "sampling_rate": 2400, "hop_length": 24, "window_size": 96, "vocoder_padding": "same", "fmin": 0, "fmax": None,
        "num_quantizers": 3, "codebook_size": [16, 16, 8], "threshold_ema_dead_code": 2,
        "position_embedding_type": "rope", "rope_theta": 10000, "rope_type": "default", "ln_type": "LayerNorm",
        **changes,
    }  # fmt: skip


def log_mel(samples_S: torch.Tensor, keys: dict[str, Any]) -> torch.Tensor:
    """Log-mel spectrogram [frames, bands]."""
    size, hop, window = keys["nfft"], keys["hop_length"], keys["window_size"]
    samples = samples_S.double()
    margin = size // 2
    padded = torch.cat([samples[1 : margin + 1].flip(0), samples, samples[-margin - 1 : -1].flip(0)])
    hann = torch.tensor([0.5 - 0.5 * math.cos(2 * math.pi * n / window) for n in range(window)], dtype=torch.float64)
    before = (size - window) // 2
    taper = torch.cat([torch.zeros(before), hann, torch.zeros(size - window - before)])
    n = torch.arange(size, dtype=torch.float64)
    angle = -2 * math.pi * torch.arange(size // 2 + 1, dtype=torch.float64)[:, None] * n / size
    rows = []
    for frame in range(len(samples) // hop + 1):
        piece = padded[frame * hop : frame * hop + size] * taper
        rows.append(torch.hypot(angle.cos() @ piece, angle.sin() @ piece))
    mel = torch.stack(rows) @ _bands(keys)
    return mel.clamp(min=1e-7).log()


def _bands(keys: dict[str, Any]) -> torch.Tensor:
    """Triangles on the HTK mel scale, one entry at a time."""
    top = keys["fmax"] or keys["sampling_rate"] / 2
    low, high = (2595 * math.log10(1 + f / 700) for f in (keys["fmin"], top))
    bands, bins = keys["n_mels"], keys["nfft"] // 2 + 1
    edges = [700 * (10 ** ((low + (high - low) * i / (bands + 1)) / 2595) - 1) for i in range(bands + 2)]
    weights = torch.zeros(bins, bands, dtype=torch.float64)
    for k in range(bins):
        f = k * keys["sampling_rate"] / 2 / (bins - 1)
        for m in range(bands):
            a, b, c = edges[m : m + 3]
            weights[k, m] = max(0.0, min((f - a) / (b - a), (c - f) / (c - b)))
    return weights


def encoder_states(mel_LM: torch.Tensor, state: State, keys: dict[str, Any]) -> torch.Tensor:
    """States [code frames, dim] before quantization."""
    w = {name.removeprefix("encoder."): t.double() for name, t in state.items() if name.startswith("encoder.")}
    x = _gelu(_conv(mel_LM.double(), w["conv1.weight"], w["conv1.bias"], stride=1, padding=1))
    x = _gelu(_conv(x, w["conv2.weight"], w["conv2.bias"], stride=keys["stride_size"], padding=1))
    skipped = torch.zeros_like(x)
    for index in range(keys["encoder_layers"]):
        x = _layer(x, w, f"layers.{index}.", keys["encoder_attention_heads"], keys["encoder_attn_window_size"],
                   causal=keys["encoder_causal"], theta=keys["rope_theta"])  # fmt: skip
        if index + 1 == keys["encoder_skip_layer_id"]:
            skipped = x
    x = _norm(x + skipped, w["layer_norm.weight"], w["layer_norm.bias"])
    pool = keys["avg_pooler"]
    if len(x) % pool:
        x = torch.cat([x, torch.zeros(pool - len(x) % pool, x.shape[1], dtype=torch.float64)])
    x = _gelu(_conv(x, w["down_sample_layer.0.weight"], None, stride=pool, padding=0))
    return _norm(x, w["down_sample_norm.weight"], w["down_sample_norm.bias"])


def codes(states_FD: torch.Tensor, state: State, keys: dict[str, Any]) -> torch.Tensor:
    """Codes [code frames, codebooks]."""
    residual, chosen = states_FD.double(), []
    for book in _books(state, keys):
        distance = (residual[:, None] - book[None]).pow(2).sum(2)
        chosen.append(distance.argmin(1))
        residual = residual - book[chosen[-1]]
    return torch.stack(chosen, 1)


def code_vectors(codes_FQ: torch.Tensor, state: State, keys: dict[str, Any]) -> torch.Tensor:
    """Sums of the chosen entries."""
    books = _books(state, keys)
    return sum((books[q][codes_FQ[:, q]] for q in range(codes_FQ.shape[1])), torch.zeros(1, dtype=torch.float64))


def _books(state: State, keys: dict[str, Any]) -> list[torch.Tensor]:
    return [
        state[f"encoder.quantizer.vq.layers.{q}._codebook.embed"].double() for q in range(keys["num_quantizers"])
    ]  # fmt: skip


def coarse_mel(vectors_FD: torch.Tensor, state: State, keys: dict[str, Any]) -> torch.Tensor:
    """Coarse mel spectrogram [mel frames, bands]."""
    w = {name.removeprefix("decoder."): t.double() for name, t in state.items() if name.startswith("decoder.")}
    x = _upsampled(vectors_FD, w, "dconv1.", keys["avg_pooler"])
    for index in range(keys["decoder_layers"]):
        x = _layer(x, w, f"layers.{index}.", keys["decoder_attention_heads"], keys["decoder_attn_window_size"],
                   causal=keys["decoder_causal"], theta=keys["rope_theta"])  # fmt: skip
    x = _norm(x, w["layer_norm.weight"], w["layer_norm.bias"])
    return _upsampled(x, w, "dconv2.", keys["decoder_stride_size"])


def waveform(mel_LM: torch.Tensor, state: State, keys: dict[str, Any]) -> torch.Tensor:
    """Waveform of a coarse mel spectrogram."""
    prefix = "decoder.vocoder."
    w = {name.removeprefix(prefix): t.double() for name, t in state.items() if name.startswith(prefix)}
    x = mel_LM @ w["embeddings.weight"].T
    for index in range(keys["vocoder_num_layers"]):
        x = _layer(x, w, f"layers.{index}.", keys["vocoder_attention_heads"], keys["vocoder_attn_window_size"],
                   causal=False, theta=keys["rope_theta"])  # fmt: skip
    x = _norm(x, w["layer_norm.weight"], w["layer_norm.bias"]) @ w["head.out.weight"].T + w["head.out.bias"]
    magnitude, phase = x.chunk(2, 1)
    magnitude = magnitude.exp().clamp(max=100.0)
    return overlap_add(magnitude * phase.cos(), magnitude * phase.sin(), keys["nfft"], keys["hop_length"])


def overlap_add(real_LH: torch.Tensor, imaginary_LH: torch.Tensor, size: int, hop: int) -> torch.Tensor:
    """Inverse short-time transform with "same" padding, sample by sample of each frame."""
    n = torch.arange(size, dtype=torch.float64)
    k = torch.arange(size // 2 + 1, dtype=torch.float64)[:, None]
    double = torch.full((size // 2 + 1, 1), 2.0, dtype=torch.float64)
    double[0] = double[-1] = 1.0
    cosines, sines = double * torch.cos(2 * math.pi * k * n / size), double * torch.sin(2 * math.pi * k * n / size)
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * n / size)
    frames = (real_LH @ cosines - imaginary_LH @ sines) / size * hann
    total = torch.zeros((len(frames) - 1) * hop + size, dtype=torch.float64)
    weight = torch.zeros_like(total)
    for index, frame in enumerate(frames):
        total[index * hop : index * hop + size] += frame
        weight[index * hop : index * hop + size] += hann**2
    margin = (size - hop) // 2
    return (total[margin:-margin] / weight[margin:-margin]) if margin else total / weight


def _conv(x_LD: torch.Tensor, weight_ODK: torch.Tensor, bias: Any, *, stride: int, padding: int) -> torch.Tensor:
    kernel = weight_ODK.shape[2]
    edge = torch.zeros(padding, x_LD.shape[1], dtype=torch.float64)
    padded = torch.cat([edge, x_LD, edge])
    count = (len(padded) - kernel) // stride + 1
    rows = [
        sum(weight_ODK[:, :, k] @ padded[i * stride + k] for k in range(kernel)) + (0 if bias is None else bias)
        for i in range(count)
    ]
    return torch.stack(rows)


def _upsampled(x_LD: torch.Tensor, w: State, prefix: str, stride: int) -> torch.Tensor:
    """Transposed convolution, group norm of one group over everything, then the causal crop."""
    weight_DOK, bias = w[f"{prefix}conv.weight"], w[f"{prefix}conv.bias"]
    kernel = weight_DOK.shape[2]
    out = bias.repeat((len(x_LD) - 1) * stride + kernel, 1)
    for i, row in enumerate(x_LD):
        for k in range(kernel):
            out[i * stride + k] += row @ weight_DOK[:, :, k]
    out = (out - out.mean()) / (out.var(unbiased=False) + 1e-5).sqrt()
    out = out * w[f"{prefix}norm.weight"] + w[f"{prefix}norm.bias"]
    return out[: len(out) - max(0, kernel - stride)]


def _layer(
    x_LD: torch.Tensor, w: State, prefix: str, heads: int, window: list[int], *, causal: bool, theta: float
) -> torch.Tensor:
    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ w[f"{prefix}{name}.weight"].T + w.get(f"{prefix}{name}.bias", torch.zeros(1, dtype=torch.float64))

    y = _norm(x_LD, w[f"{prefix}self_attn_layer_norm.weight"], w[f"{prefix}self_attn_layer_norm.bias"])
    q, k, v = (linear(f"self_attn.{name}_proj", y).unflatten(1, (heads, -1)) for name in "qkv")
    q, k = _rotated(q, theta), _rotated(k, theta)
    position = torch.arange(len(x_LD))
    distance = position[None] - position[:, None]  # of the key from the query
    left, right = window
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if causal or right >= 0:
        seen &= distance <= (0 if causal else right)
    outputs = []
    for head in range(heads):
        logits = q[:, head] @ k[:, head].T / math.sqrt(q.shape[2])
        outputs.append(logits.masked_fill(~seen, -math.inf).softmax(1) @ v[:, head])
    x_LD = x_LD + linear("self_attn.out_proj", torch.cat(outputs, 1))
    y = _norm(x_LD, w[f"{prefix}final_layer_norm.weight"], w[f"{prefix}final_layer_norm.bias"])
    return x_LD + linear("fc2", _gelu(linear("fc1", y)))


def _rotated(x_LNK: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions as a product of complex numbers: dim i is the real part, dim i + K/2 the imaginary one."""
    half = x_LNK.shape[2] // 2
    rate = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.exp(1j * torch.arange(len(x_LNK), dtype=torch.float64)[:, None, None] * rate)
    turned = torch.complex(x_LNK[..., :half].contiguous(), x_LNK[..., half:].contiguous()) * turn
    return torch.cat([turned.real, turned.imag], 2)


def _norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
