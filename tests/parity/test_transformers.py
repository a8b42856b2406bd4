"""The model against transformers' independent `mimo_v2_flash` (and `qwen2` for the dense MiMo-7B family)."""

import pytest
import torch
from conftest import randomize, tiny_config, tiny_model

import openmimo
from openmimo.kernels.operations import token_loss
from openmimo.model.config import LayerConfig
from openmimo.model.context import PackedContext

transformers = pytest.importorskip("transformers")


def _theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("seed", range(3))
def test_they_load_ours(tmp_path, seed):
    model = tiny_model(seed, window_keys=5 + 4 * seed)
    openmimo.save_model(model, tmp_path)
    ids = torch.randint(0, 160, (60,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = _theirs(tmp_path)(ids[None]).logits[0]
        assert (model.logits(ids) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_we_load_theirs(tmp_path, seed):
    config = transformers.MiMoV2FlashConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=7,
        num_attention_heads=8, num_key_value_heads=2, head_dim=24, v_head_dim=16, n_routed_experts=8,
        num_experts_per_tok=2, sliding_window=9 + seed, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
        n_group=[1, 4, 2][seed], topk_group=[1, 2, 1][seed], routed_scaling_factor=[1.0, 2.5, 1.0][seed],
        norm_topk_prob=seed != 2,
    )  # fmt: skip
    theirs = transformers.MiMoV2FlashForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if "rotary" in name or "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if "norm" in name else noise * (1.0 if "sinks" in name else 0.15))
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 160, (60,), generator=generator)
    with torch.no_grad():
        ours = openmimo.load_model(tmp_path).logits(ids)
        assert (ours - theirs(ids[None]).logits[0]).abs().max() <= 1e-4


def test_the_window_is_tested_at_all(tmp_path):
    """One key more or less in the window changes logits by orders of magnitude more than the tolerance."""
    openmimo.save_model(tiny_model(window_keys=9), tmp_path)
    ids = torch.arange(60) % 160
    with torch.no_grad():
        right = openmimo.load_model(tmp_path).logits(ids)
        wrong = openmimo.load_model(tmp_path, window_keys=10).logits(ids)
    assert (right - wrong).abs().max() > 1e-2


def test_gradients_match(tmp_path):
    model = tiny_model(3)
    openmimo.save_model(model, tmp_path)
    theirs = _theirs(tmp_path)
    ids = torch.randint(0, 160, (50,), generator=torch.Generator().manual_seed(1))
    hidden = model(ids, PackedContext((len(ids),))).post_norm_TD
    loss = token_loss(hidden[:-1], model.lm_head.weight, ids[1:], torch.full((49,), 1 / 49))
    expected = torch.nn.functional.cross_entropy(theirs(ids[None]).logits[0, :-1], ids[1:])
    assert abs(loss.item() - expected.item()) < 1e-5
    loss.backward()
    expected.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in theirs.named_parameters():
        name = name.replace(".sinks", ".attention_sink_bias")
        difference = (ours.pop(name) - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-8)
        assert difference < 1e-4, f"{name}: relative difference {difference}"
    assert not ours


def test_mimo_7b_family_matches_qwen2(tmp_path):
    """The dense family without its MTP layer is Qwen2 with query, key and value biases."""
    from dataclasses import replace

    from openmimo.model.mimo import MiMo

    full = replace(tiny_config().layers[0].attention, key_dim=16, value_dim=16, rotary_dim=16)
    config = replace(
        tiny_config(), layers=(LayerConfig(full, "dense"),) * 3, moe=None, attention_bias=True, family="mimo",
        value_scale=1.0, hidden_size=128,
    )  # fmt: skip
    model = randomize(MiMo(config), 0)
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=160, hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
            num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if "mtp" not in k}, strict=True)
    ids = torch.randint(0, 160, (40,))
    with torch.no_grad():
        assert (model.logits(ids) - theirs(ids[None]).logits[0]).abs().max() <= 1e-4
    openmimo.save_model(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(openmimo.load_model(tmp_path).logits(ids), model.logits(ids))
