"""Audio tokenizer: streams equal whole sequences, nothing leaks from the future, bad input gets a clear error."""

import json
from dataclasses import replace

import audio_reference as reference
import numpy as np
import pytest
import torch

from openmimo.core.errors import CheckpointError, ConfigError, DataError, UserError
from openmimo.model.audio import tokenizer as tokenizer_module
from openmimo.model.audio.checkpoint import count_parameters, released_name
from openmimo.model.audio.config import config_from_released, config_to_released, preset
from openmimo.model.audio.mel import LogMel, mel_bands
from openmimo.model.audio.quantizer import Codebook, ResidualQuantizer, k_means, perplexity
from openmimo.model.audio.tokenizer import AudioTokenizer, load_audio_tokenizer, save_audio_tokenizer
from openmimo.model.audio.vocoder import InverseTransform

FRAME_NORM = {"openmimo_decoder_norm": "frame"}


def small(**changes) -> AudioTokenizer:
    torch.manual_seed(0)
    tokenizer = AudioTokenizer(config_from_released(reference.small_keys(**FRAME_NORM | changes), "keys")).eval()
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return tokenizer


def random_codes(tokenizer: AudioTokenizer, frames: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = tokenizer.config.codebook_sizes
    return torch.stack([torch.randint(size, (frames,), generator=generator) for size in sizes], dim=1)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_the_inverse_transform_inverts_the_transform():
    fft, hop, frames = 96, 24, 30
    waveform_S = torch.randn(frames * hop)
    transform = InverseTransform(fft, hop)
    padded = torch.nn.functional.pad(waveform_S, (transform.margin, transform.margin))
    spectrum_HL = torch.stft(padded, fft, hop, window=transform.window, center=False, return_complex=True)
    assert spectrum_HL.shape[1] == frames
    torch.testing.assert_close(transform(spectrum_HL.T[None])[0], waveform_S, atol=1e-5, rtol=0)


def test_the_overlap_add_of_one_frame_is_the_reference():
    spectrum = torch.randn(1, 1, 49, dtype=torch.complex64)
    spectrum[..., [0, -1]] = spectrum[..., [0, -1]].real.to(torch.complex64)
    expected = reference.overlap_add(spectrum[0].real.double(), spectrum[0].imag.double(), 96, 24)
    torch.testing.assert_close(InverseTransform(96, 24)(spectrum)[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_mel_spectrograms_equal_those_of_transformers():
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    filters = mel_filter_bank(
        num_frequency_bins=481, num_mel_filters=128, min_frequency=0, max_frequency=12_000, sampling_rate=24_000,
        norm=None, mel_scale="htk",
    )  # fmt: skip
    bands = mel_bands(sample_rate=24_000, frequencies=481, mel_bins=128, lowest=0, highest=12_000)
    np.testing.assert_allclose(bands, filters, atol=1e-6)
    waveform = np.random.default_rng(0).standard_normal(4000).astype(np.float32) * 0.1
    expected = spectrogram(
        waveform, window_function(960, "hann"), 960, 240, 960, power=1.0, center=True, mel_filters=filters,
        log_mel="log", mel_floor=1e-7,
    )  # fmt: skip
    transform = LogMel(sample_rate=24_000, fft_samples=960, window_samples=960, hop_samples=240, mel_bins=128)
    np.testing.assert_allclose(transform(torch.from_numpy(waveform)[None])[0].T, expected, atol=1e-4)


@pytest.mark.parametrize("remedies", [False, True])
def test_codebooks_collapse_without_k_means_and_expiry(remedies):
    """Entries start far from the data: without the remedies, few of them are ever chosen."""
    torch.manual_seed(0)
    codebook = Codebook(64, 8, expiry_threshold=0.5 if remedies else 0.0)
    codebook.embed.mul_(5)
    codebook.embed_avg.copy_(codebook.embed)
    centers = torch.randn(64, 8) * 0.5
    for step in range(60):
        batch = centers[torch.randint(64, (256,))] + torch.randn(256, 8) * 0.05
        if remedies and step == 0:
            codebook.initialize(batch, 10)
        codebook.update(batch, codebook.nearest(batch))
    used = perplexity(codebook.nearest(centers + torch.randn(64, 8) * 0.05), 64)
    assert used > 45 if remedies else used < 15, used


def test_entries_that_are_not_used_are_replaced_by_vectors_of_the_batch():
    torch.manual_seed(0)
    codebook = Codebook(8, 2, expiry_threshold=1.0)
    codebook.embed.fill_(100.0)
    batch = torch.randn(32, 2)
    codebook.update(batch, codebook.nearest(batch))
    distance = (codebook.embed[:, None] - batch).norm(dim=2).min(dim=1).values
    assert (distance[1:] < 1e-6).all()
    codebook.update(batch, codebook.nearest(batch))
    assert (codebook.embed.abs() < 10).sum() >= 14


def test_a_codebook_moves_to_the_means_of_its_members():
    codebook = Codebook(2, 1, decay=0.0, expiry_threshold=0.0)
    codebook.embed.copy_(torch.tensor([[0.0], [10.0]]))
    batch = torch.tensor([[1.0], [3.0], [9.0], [12.0], [12.0]])
    codebook.update(batch, codebook.nearest(batch))
    torch.testing.assert_close(codebook.embed, torch.tensor([[2.0], [11.0]]), atol=1e-3, rtol=0)


def test_k_means_finds_separate_clusters():
    torch.manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    found, counts = k_means(centers.repeat_interleave(50, 0) + torch.randn(150, 2) * 0.01, 3, 20)
    assert counts.sum() == 150
    distance = torch.cdist(centers, found).min(dim=1).values
    assert (distance < 0.1).sum() >= 2


def test_the_gradient_passes_the_quantizer_and_each_codebook_lowers_the_error():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer((16, 16, 16), 4, expiry_threshold=0.0)
    x = torch.randn(200, 4, requires_grad=True)
    quantizer.initialize(x.detach(), 20)
    quantized = quantizer(x, torch.randint(1, 4, (200,)))
    quantized.output_TD.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    codes = quantizer.encode(x)
    assert torch.equal(quantized.ids_TQ, codes)
    errors = [float((quantizer.decode(codes[:, :count]) - x.detach()).pow(2).mean()) for count in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    partial = quantizer(x, torch.full((200,), 2)).output_TD
    torch.testing.assert_close(partial, quantizer.decode(codes[:, :2]))


def test_perplexity_of_equal_use_is_the_number_of_entries():
    assert perplexity(torch.arange(8).repeat(3), 16) == pytest.approx(8)
    assert perplexity(torch.zeros(10, dtype=torch.int64), 16) == pytest.approx(1)


# --- encoding and decoding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 47, 48, 95, 96, 97, 1000, 2400])
def test_lengths(samples):
    tokenizer = small()
    codes = tokenizer.encode(torch.randn(samples) * 0.1)
    frames = tokenizer.num_frames(samples)
    assert codes.shape == (frames, 3) and codes.dtype == torch.int64
    assert samples <= frames * tokenizer.config.samples_per_frame <= samples + 2 * tokenizer.config.samples_per_frame
    assert tokenizer.decode(codes).shape == (frames * tokenizer.config.samples_per_frame,)


def test_fewer_codebooks_are_the_first_ones():
    tokenizer, waveform = small(), torch.randn(1000) * 0.1
    assert torch.equal(tokenizer.encode(waveform, codebooks=2), tokenizer.encode(waveform)[:, :2])


def test_long_audio_is_encoded_in_segments(monkeypatch):
    tokenizer, waveform = small(), torch.randn(4000) * 0.1
    monkeypatch.setattr(tokenizer_module, "SEGMENT_MEL_FRAMES", 40)
    lengths = []
    tokenizer.encoder.register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    codes = tokenizer.encode(waveform)
    mel_BLM = tokenizer.log_mel(waveform[None])
    assert lengths == [40] * (mel_BLM.shape[1] // 40) + [mel_BLM.shape[1] % 40]
    parts = [tokenizer.encoder.quantizer.encode(tokenizer.encoder(part)[0]) for part in mel_BLM.split(40, dim=1)]
    assert torch.equal(codes, torch.cat(parts))
    assert len(codes) == tokenizer.num_frames(4000)


STREAMS = {
    "unlimited decoder": {},
    "windows": {"decoder_attn_window_size": [7, 0], "vocoder_attn_window_size": [11, 4]},
    "vocoder without later frames": {"vocoder_attn_window_size": [5, 0]},
    "vocoder with all earlier frames": {"vocoder_attn_window_size": [-1, 2]},
    "decoder with some later frames": {"decoder_causal": False, "decoder_attn_window_size": [6, 2]},
    "longer kernel": {"decoder_kernel_size": 7},
}


@pytest.mark.parametrize("changes", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_a_stream_gives_the_samples_of_decode(changes, step):
    tokenizer = small(**changes)
    codes = random_codes(tokenizer, 40)[:, :2]
    stream = tokenizer.stream()
    parts = [stream.push(part) for part in codes.split(step)]
    joined = torch.cat([*parts, stream.finish()])
    torch.testing.assert_close(joined, tokenizer.decode(codes), atol=1e-5, rtol=1e-4)
    assert sum(len(part) for part in parts) > 20 * tokenizer.config.samples_per_frame


def test_long_codes_are_decoded_in_parts(monkeypatch):
    tokenizer = small()
    codes = random_codes(tokenizer, 50)
    whole, lengths = tokenizer.decode(codes), []
    monkeypatch.setattr(tokenizer_module, "WHOLE_FRAMES", 20)
    tokenizer.decoder.vocoder.embeddings.register_forward_pre_hook(
        lambda module, arguments: lengths.append(arguments[0].shape[1])
    )
    torch.testing.assert_close(tokenizer.decode(codes), whole, atol=1e-5, rtol=1e-4)
    assert lengths == [80, 80, 40, 0]
    small_sequence = small(openmimo_decoder_norm="sequence")
    assert not small_sequence.has_exact_streams and len(small_sequence.decode(codes)) == len(whole)


def test_an_empty_stream_and_empty_parts():
    tokenizer = small()
    assert len(tokenizer.stream().finish()) == 0
    assert len(tokenizer.decode(random_codes(tokenizer, 0))) == 0
    stream, codes = tokenizer.stream(), random_codes(tokenizer, 9)
    parts = [stream.push(codes[:0]), stream.push(codes[:4]), stream.push(codes[:0]), stream.push(codes[4:])]
    torch.testing.assert_close(torch.cat([*parts, stream.finish()]), tokenizer.decode(codes), atol=1e-5, rtol=1e-4)


def test_a_stream_with_sequence_norms_comes_close():
    """The released norms use statistics of the whole sequence; a stream has only those of the sequence so far."""
    tokenizer = small(openmimo_decoder_norm="sequence")
    codes = random_codes(tokenizer, 300)
    stream = tokenizer.stream()
    joined = torch.cat([*[stream.push(part) for part in codes.split(50)], stream.finish()])
    whole = tokenizer.decode(codes)
    late = slice(200 * tokenizer.config.samples_per_frame, None)
    assert 0 < (joined - whole)[late].abs().mean() < 0.05 * whole[late].abs().mean()


def test_a_tokenizer_that_sees_all_later_frames_has_no_stream():
    with pytest.raises(ConfigError, match="see all later positions"):
        small(decoder_causal=False).stream()


@pytest.mark.parametrize("norm", ["frame", "sequence"])
def test_only_a_sequence_norm_lets_the_decoder_see_later_codes(norm):
    tokenizer = small(openmimo_decoder_norm=norm)
    codes = random_codes(tokenizer, 40)
    changed = torch.cat([codes[:25], random_codes(tokenizer, 15, seed=1)])
    with torch.no_grad():
        before, after = (
            tokenizer.decoder.coarse_mel(tokenizer.encoder.quantizer.decode(part)[None])[0] for part in (codes, changed)
        )
    earlier = 25 * tokenizer.config.mel_frames_per_frame
    assert torch.equal(before[:earlier], after[:earlier]) == (norm == "frame")
    assert not torch.equal(before[earlier:], after[earlier:])


def test_the_waveform_depends_on_the_window_of_the_vocoder_only():
    tokenizer = small(vocoder_attn_window_size=[6, 3])
    codes = random_codes(tokenizer, 40)
    changed = torch.cat([codes[:25], random_codes(tokenizer, 15, seed=1)])
    config = tokenizer.config
    lookahead = config.vocoder.num_layers * 3 * config.hop_samples + (config.fft_samples + config.hop_samples) // 2
    same = 25 * config.samples_per_frame - lookahead
    before, after = tokenizer.decode(codes), tokenizer.decode(changed)
    torch.testing.assert_close(before[:same], after[:same], atol=1e-6, rtol=0)
    assert not torch.allclose(before[same : same + lookahead], after[same : same + lookahead], atol=1e-6)


# --- bad input -------------------------------------------------------------------------------------------------------

BAD_WAVEFORMS = {
    "empty": (torch.zeros(0), "is empty"),
    "stereo": (torch.zeros(2, 1000), r"shape \[2, 1000\]; give one channel"),
    "integers": (torch.zeros(1000, dtype=torch.int16), "dtype torch.int16; give float32"),
    "NaN": (torch.tensor([0.0, float("nan")]), "sample 1 .* is nan"),
    "infinity": (torch.tensor([float("-inf"), 0.0]), "sample 0 .* is -inf"),
    "array": (np.zeros(1000, np.float32), "type ndarray; give a torch.Tensor"),
    "list": ([0.0, 0.1], "type list"),
    "scalar": (torch.tensor(0.5), r"shape \[\]"),
}


@pytest.mark.parametrize(("waveform", "message"), BAD_WAVEFORMS.values(), ids=BAD_WAVEFORMS)
def test_bad_waveforms(waveform, message):
    with pytest.raises(UserError, match=message):
        small().encode(waveform)


BAD_CODES = {
    "above": (torch.tensor([[0, 0, 0], [0, 0, 8]]), "code 8 of frame 1 is outside codebook 2, which has 8 entries"),
    "below": (torch.tensor([[0, -1]]), "code -1 of frame 0 is outside codebook 1"),
    "too many codebooks": (torch.zeros(5, 4, dtype=torch.int64), "4 codebooks; this tokenizer has 3"),
    "no codebook": (torch.zeros(5, 0, dtype=torch.int64), "0 codebooks"),
    "floats": (torch.zeros(5, 3), "torch.float32"),
    "one dimension": (torch.zeros(5, dtype=torch.int64), "shape"),
    "list": ([[0, 0, 0]], "list"),
}


@pytest.mark.parametrize(("codes", "message"), BAD_CODES.values(), ids=BAD_CODES)
def test_bad_codes(codes, message):
    with pytest.raises(UserError, match=message):
        small().decode(codes)
    with pytest.raises(UserError, match=message):
        small().stream().push(codes)


def test_misuse_of_a_stream():
    tokenizer = small()
    stream = tokenizer.stream()
    stream.push(random_codes(tokenizer, 2))
    with pytest.raises(DataError, match="2 codebooks, but those before had 3"):
        stream.push(random_codes(tokenizer, 2)[:, :2])
    stream.finish()
    for call in (stream.finish, lambda: stream.push(random_codes(tokenizer, 2))):
        with pytest.raises(DataError, match="finished"):
            call()
    with pytest.raises(DataError, match="codebooks is 4; this tokenizer has 1 to 3"):
        tokenizer.encode(torch.zeros(1000), codebooks=4)


# --- configs and folders ---------------------------------------------------------------------------------------------


def test_released_keys_round_trip():
    keys = reference.small_keys()
    config = config_from_released(keys, "keys")
    written = config_to_released(config)
    assert {name: written[name] for name in keys} == keys | {"decoder_attn_window_size": [-1, 0]}
    for name in ("tiny_codec", "mimo_audio_tokenizer"):
        assert config_from_released(config_to_released(preset(name)), name) == preset(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_modell": 3}, "d_modell"),
        ({"ln_type": "RMSNorm"}, "ln_type"),
        ({"rope_type": "yarn"}, "rope_type"),
        ({"d_model": 30}, "4 heads"),
        ({"codebook_size": [16] * 4}, "4 sizes for 3 quantizers"),
        ({"stride_size": 4}, "decoder_stride"),
        ({"vocoder_padding": "center"}, "vocoder_padding"),
        ({"fmax": 5000}, "mel bands"),
        ({"encoder_skip_layer_id": 9}, "skip_layer"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_released(reference.small_keys() | change, "config.json")
    keys = reference.small_keys()
    del keys["d_model"]
    with pytest.raises(ConfigError, match="d_model"):
        config_from_released(keys, "config.json")
    with pytest.raises(ConfigError, match="tiny_codec"):
        preset("huge")


def test_the_released_tokenizer_has_its_size_and_names():
    with torch.device("meta"):
        tokenizer = AudioTokenizer(preset("mimo_audio_tokenizer"))
    vocoder = count_parameters(tokenizer.decoder.vocoder)
    assert count_parameters(tokenizer) == 1_290_223_682
    assert (vocoder, count_parameters(tokenizer.decoder) - vocoder) == (12_912_578, 633_412_224)
    shapes = {released_name(name): list(tensor.shape) for name, tensor in tokenizer.state_dict().items()}
    assert len(shapes) == 15 * (32 + 32 + 16) + 4 * 20 + 9 + 10 + 6  # layers, codebooks, others of the three parts
    for name, shape in {
        "encoder.conv1.weight": [1280, 128, 3],
        "encoder.layers.31.self_attn.k_proj.weight": [1280, 1280],
        "encoder.layers.0.fc1.weight": [5120, 1280],
        "encoder.down_sample_layer.0.weight": [1280, 1280, 2],
        "encoder.quantizer.vq.layers.1._codebook.embed": [1024, 1280],
        "encoder.quantizer.vq.layers.19._codebook.cluster_size": [128],
        "decoder.dconv1.conv.weight": [1280, 1280, 2],
        "decoder.dconv1.norm.weight": [1280],
        "decoder.dconv2.conv.weight": [1280, 128, 3],
        "decoder.layers.31.final_layer_norm.bias": [1280],
        "decoder.vocoder.embeddings.weight": [256, 128],
        "decoder.vocoder.layers.15.fc2.weight": [256, 1024],
        "decoder.vocoder.head.out.weight": [962, 256],
        "decoder.vocoder.head.istft.window": [960],
    }.items():
        assert shapes[name] == shape, name
    assert "encoder.layers.0.self_attn.k_proj.bias" not in shapes


def test_a_folder_round_trips(tmp_path):
    tokenizer = small()
    save_audio_tokenizer(tokenizer, tmp_path / "saved")
    loaded = load_audio_tokenizer(tmp_path / "saved")
    assert loaded.config == tokenizer.config
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    waveform = torch.randn(1000) * 0.1
    assert torch.equal(loaded.encode(waveform), tokenizer.encode(waveform))
    half = load_audio_tokenizer(tmp_path / "saved", dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.encoder.quantizer.books[0].embed.dtype == torch.float32
    codes = half.encode(waveform)
    assert half.decode(codes).dtype == torch.float32


def test_damaged_folders(tmp_path):
    tokenizer = small()
    folder = tmp_path / "saved"
    save_audio_tokenizer(tokenizer, folder)
    keys = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"encoder_layers": 4}, "lacks encoder.layers.3"),
        ({"encoder_layers": 2}, "holds encoder.layers.2"),
        ({"codebook_size": [16, 16, 9]}, "_codebook.embed in .* has shape"),
    ):
        (folder / "config.json").write_text(json.dumps(keys | change))
        with pytest.raises(CheckpointError, match=message):
            load_audio_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(keys))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        load_audio_tokenizer(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_audio_tokenizer(folder)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_audio_tokenizer(tmp_path / "missing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        save_audio_tokenizer(tokenizer, tmp_path / "full")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tokenizer = small()
    with torch.no_grad():
        tokenizer.decoder.layer_norm.weight[3] = float("nan")
    save_audio_tokenizer(tokenizer, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"decoder\.layer_norm\.weight holds an infinity or NaN"):
        load_audio_tokenizer(tmp_path / "saved")


def test_presets_replace_in_one_place():
    config = preset("tiny_codec")
    assert (config.sample_rate, config.samples_per_frame, config.frames_per_second) == (24_000, 960, 25.0)
    assert replace(config, codebook_sizes=(4,)).num_codebooks == 1
