"""The audio tokenizer against an independent reference, and against the published classes where they are at hand.

Set OPENMIMO_MIMO_AUDIO_SOURCE to a clone of github.com/XiaomiMiMo/MiMo-Audio, bare or not, or to its folder `src`, to
run the published classes with torch's attention in place of flash-attn.
"""

import importlib.util
import math
import sys
import types

import audio_reference as reference
import pytest
import torch
import torch.nn.functional as F
from public_mimo_audio import public_package, public_text

from openmimo.model.audio.checkpoint import released_name
from openmimo.model.audio.config import config_from_released
from openmimo.model.audio.tokenizer import AudioTokenizer

PACKAGE = "mimo_audio_tokenizer"
MODULES = (
    "__init__",
    "configuration_audio_tokenizer",
    "modeling_audio_tokenizer",
    "modeling_rope_utils",
    "quantization",
)
VARIANTS = {
    "released": {},
    "windows": {"encoder_attn_window_size": [5, 7], "decoder_attn_window_size": [9, -1], "encoder_causal": False},
    "causal encoder": {"encoder_causal": True, "encoder_skip_layer_id": None, "window_size": 72},
    "one codebook size": {"num_quantizers": 4, "codebook_size": [12], "fmin": 50, "fmax": 1000},
}


def random_tokenizer(keys: dict, seed: int = 0) -> AudioTokenizer:
    """A tokenizer whose parameters are all random, norms and biases included, and whose codebooks fit its states."""
    torch.manual_seed(seed)
    tokenizer = AudioTokenizer(config_from_released(keys, "keys")).eval()
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + name.endswith("weight"))
            elif parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        for codebook in tokenizer.encoder.quantizer.books:
            codebook.embed.copy_(torch.randn_like(codebook.embed) * 0.6)
    return tokenizer


def state_of(tokenizer: AudioTokenizer) -> dict[str, torch.Tensor]:
    return {released_name(name): tensor for name, tensor in tokenizer.state_dict().items()}


def samples_of(keys: dict, count: int) -> torch.Tensor:
    n = torch.arange(count)
    tone = torch.sin(2 * math.pi * n * (60 + 0.2 * n.float()) / keys["sampling_rate"])
    return (0.5 * tone + 0.05 * torch.randn(count, generator=torch.Generator().manual_seed(1))).float()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("samples", [1000, 2400])
def test_every_stage_equals_the_reference(variant, samples):
    keys = reference.small_keys(**VARIANTS[variant])
    tokenizer, waveform_S = random_tokenizer(keys), samples_of(keys, samples)
    state = state_of(tokenizer)
    with torch.no_grad():
        mel_BLM = tokenizer.log_mel(waveform_S[None])
        mel = reference.log_mel(waveform_S, keys)
        torch.testing.assert_close(mel_BLM[0].double(), mel, atol=1e-4, rtol=0)
        states = reference.encoder_states(mel, state, keys)
        torch.testing.assert_close(tokenizer.encoder(mel_BLM)[0].double(), states, atol=1e-4, rtol=0)
        codes = reference.codes(states, state, keys)
        assert torch.equal(tokenizer.encode(waveform_S), codes)
        vectors = reference.code_vectors(codes, state, keys)
        mel = reference.coarse_mel(vectors, state, keys)
        coarse_BLM = tokenizer.decoder.coarse_mel(vectors[None].float())
        torch.testing.assert_close(coarse_BLM[0].double(), mel, atol=1e-4, rtol=0)
        decoded = reference.waveform(mel, state, keys)
        assert decoded.abs().max() > 1e-3
        torch.testing.assert_close(tokenizer.decode(codes).double(), decoded, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The published classes. Skips where the source is absent."""
    public_text(f"src/{PACKAGE}/__init__.py")
    shims = {"flash_attn": {"flash_attn_varlen_func": attention_of_torch}}
    if importlib.util.find_spec("einops") is None:
        shims["einops"] = {"rearrange": rearranged, "repeat": repeated}
    for name, functions in shims.items():
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
            vars(module).update(functions)
            sys.modules[name] = module
    return public_package(PACKAGE, MODULES, tmp_path_factory.mktemp("public"))


def published(package, keys: dict):
    """A published tokenizer with these keys."""
    return package.MiMoAudioTokenizer(package.MiMoAudioTokenizerConfig(**keys)).eval()


def attention_of_torch(q, k, v, cu_q, cu_k, max_q, max_k, *, causal, window_size):
    outputs = []
    for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        position = torch.arange(end - start)
        distance = position[None] - position[:, None]
        left, right = window_size
        right = 0 if causal else right
        seen = ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))
        parts = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(*parts, attn_mask=seen)[0].transpose(0, 1))
    return torch.cat(outputs)


def rearranged(x, pattern):
    assert pattern == "... d -> (...) d"
    return x.reshape(-1, x.shape[-1])


def repeated(x, pattern, *, d):
    assert pattern == "n -> n d"
    return x[:, None].expand(-1, d)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_stage_equals_the_published_classes(variant, package):
    keys = reference.small_keys(**VARIANTS[variant])
    theirs = published(package, {**keys, "codebook_size": list(keys["codebook_size"])})
    tokenizer, waveform_S = random_tokenizer(keys), samples_of(keys, 2390)
    theirs.load_state_dict(state_of(tokenizer), strict=True)
    with torch.no_grad():
        mel_LM = tokenizer.log_mel(waveform_S[None])[0]
        length = torch.tensor([len(mel_LM)])
        packed = theirs.encode(mel_LM, length, use_quantizer=False)[1]
        states = tokenizer.encoder(mel_LM[None])[0]
        their_codes, _ = theirs.encoder.encode(mel_LM, length, return_codes_only=True)
        codes = tokenizer.encode(waveform_S)
        caught = {}
        theirs.decoder.vocoder.register_forward_pre_hook(
            lambda module, arguments, given: caught.update(mel=given["x"]), with_kwargs=True
        )
        decoded = theirs.decode(their_codes)[0, 0]
        coarse = tokenizer.decoder.coarse_mel(tokenizer.encoder.quantizer.decode(codes)[None])[0]
        ours = tokenizer.decode(codes)
    differences = {
        "encoder": float((packed - states).abs().max()),
        "decoder mel": float((caught["mel"][0].T - coarse).abs().max()),
        "waveform": float((decoded - ours).abs().max()),
        "largest sample": float(ours.abs().max()),
    }
    print(variant, differences)
    torch.testing.assert_close(packed, states, atol=1e-4, rtol=0)
    assert torch.equal(their_codes.T, codes)
    torch.testing.assert_close(caught["mel"][0].T, coarse, atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded, ours, atol=1e-5, rtol=1e-4)


def test_a_published_tokenizer_loads_ours_and_ours_loads_it(package):
    keys = reference.small_keys()
    theirs, ours = published(package, keys), random_tokenizer(keys)
    from openmimo.model.audio.checkpoint import own_name

    names = {own_name(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(names, strict=True)
    theirs.load_state_dict(state_of(random_tokenizer(keys, seed=1)), strict=True)
