"""Int8 and FP8 weights: the tokens of their dequantized values, half the bytes, checkpoints as stored."""

from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_config, tiny_model

import openmimo
from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.records import SamplingParams
from openmimo.engine.llm import LLM
from openmimo.engine.worker import why_no_graphs
from openmimo.kernels.weights import BlockScaled, dequantized
from openmimo.model.convert import ConvertConfig, convert
from openmimo.model.hf import load_model, save_model, slots
from openmimo.model.mimo import MiMo
from openmimo.model.weight_formats import QuantizableModule, is_fp8_in_hub_layout, quantize_model

IDS = torch.randint(0, 160, (40,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with an MTP head, whose matrices end in partial blocks."""
    base = tiny_config(num_layers=7, mtp_heads=1)
    config = replace(base, hidden_size=136, dense_ffn_dim=150, moe=replace(base.moe, expert_dim=72))
    path = tmp_path_factory.mktemp("formats") / "plain"
    save_model(randomize(MiMo(config), 3), path)
    return path


@pytest.fixture(scope="module", params=["split", "fused_qkv"])
def fp8_folder(request, folder):
    path = folder.parent / request.param
    convert(
        folder, path, ConvertConfig(dtype="fp8", projections=request.param), start=lambda *_: lambda num_bytes: None
    )
    return path


def held(model):
    """Returns every block-scaled weight of a model."""
    modules = [module for module in model.modules() if isinstance(module, QuantizableModule)]
    return [module.held_weight(name) for module in modules for name in module.blocks]


def with_dequantized_weights(model, like):
    """Copies the values of a quantized model to `like` in float32."""
    values = {slot.name: dequantized(slot.target, torch.float32) for slot in slots(model)}
    with torch.no_grad():
        for slot in slots(like):
            slot.target.copy_(values[slot.name])
    return like


def logits(model):
    with torch.inference_mode():
        return model.logits(IDS)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_the_greedy_text_is_that_of_the_dequantized_weights_in_float32(folder, weights):
    llm = LLM(folder, weights=weights)
    exact = LLM(with_dequantized_weights(llm.model, load_model(folder)))
    params = SamplingParams(max_tokens=24, temperature=0.0)
    prompts = [IDS.tolist(), IDS[5:12].tolist()]
    ours, theirs = ([c.token_ids for c in engine.generate(prompts, params)] for engine in (llm, exact))
    assert ours == theirs
    assert torch.allclose(logits(llm.model), logits(exact.model), atol=1e-4)
    assert (logits(llm.model) - logits(load_model(folder))).abs().max() > 1e-4


def test_fp8_covers_the_matrices_that_a_published_checkpoint_stores_so(folder):
    held_as_codes = {
        slot.name: not isinstance(slot.target, torch.Tensor) for slot in slots(load_model(folder, weights="fp8"))
    }
    assert held_as_codes == {name: is_fp8_in_hub_layout(name) for name in held_as_codes}
    assert held_as_codes["model.layers.1.mlp.experts.0.down_proj.weight"]


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_matrices_take_about_half_the_bytes_of_bfloat16(folder, weights):
    """Scales are a larger share of these small matrices than of real ones."""
    scaled = held(load_model(folder, weights=weights))
    assert len(scaled) > 30
    assert all(isinstance(weight, BlockScaled) and weight.format == weights for weight in scaled)
    ratio = sum(weight.nbytes for weight in scaled) / sum(2 * weight.codes.numel() for weight in scaled)
    assert 0.5 < ratio < 0.53


def test_an_fp8_checkpoint_is_held_as_it_is_stored(fp8_folder):
    stored, plain = load_model(fp8_folder, weights="fp8"), load_model(fp8_folder)
    assert held(stored) and not held(plain)
    for ours, theirs in zip(slots(stored), slots(plain), strict=True):
        assert torch.equal(dequantized(ours.target, torch.float32), theirs.target)
    ours, theirs = (logits(load_model(fp8_folder, "float64", weights=weights)) for weights in ("fp8", "plain"))
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_a_plain_checkpoint_is_quantized_like_its_converted_copy(folder, fp8_folder):
    if fp8_folder.name != "split":
        pytest.skip("a fused matrix has other blocks")
    ours, theirs = load_model(folder, weights="fp8"), load_model(fp8_folder, weights="fp8")
    in_memory = load_model(folder)
    quantize_model(in_memory, "fp8", in_memory.config.qkv_ranks)
    compared = 0
    for mine, loaded, stored in zip(slots(in_memory), slots(ours), slots(theirs), strict=True):
        assert mine.name == loaded.name == stored.name
        values = [dequantized(slot.target, torch.float32) for slot in (mine, loaded, stored)]
        assert torch.equal(values[0], values[1])
        if isinstance(loaded.target, BlockScaled) and "experts" in loaded.name:
            assert torch.equal(values[1], values[2])
            compared += 1
    assert compared


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_state_moves_and_loads_without_a_change_of_codes_and_scales(folder, weights):
    model = load_model(folder, weights=weights)
    before = logits(model)
    model.double().float().to("cpu")
    assert torch.equal(logits(model), before)
    other = load_model(folder, weights=weights)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), before)
    empty = model.to_empty(device="meta")
    assert [weight.format for weight in held(empty)] == [weights] * len(held(empty))


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_new_weights_are_quantized_again(folder, weights):
    model = load_model(folder, weights=weights)
    new = randomize(MiMo(model.config), 9)
    LLM(model).engine.update_weights(new.state_dict(), version=1)
    quantize_model(new, weights, new.config.qkv_ranks)
    assert torch.equal(logits(model), logits(new))


def test_a_quantized_model_is_not_saved(folder, tmp_path):
    for weights in ("int8", "fp8"):
        with pytest.raises(CheckpointError, match=f"held as {weights}, and a quantized model"):
            openmimo.save_model(load_model(folder, weights=weights), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_the_option_and_its_earlier_name(folder):
    earlier, now = LLM(folder, int8=True), LLM(folder, weights="int8")
    assert torch.equal(logits(earlier.model), logits(now.model))
    assert {weight.format for weight in held(earlier.model)} == {"int8"}
    with pytest.raises(ConfigError, match="give one of the two"):
        LLM(folder, weights="fp8", int8=True)
    with pytest.raises(ConfigError, match="int8"):
        LLM(folder, weights="int4")
    with pytest.raises(ConfigError, match="plain, int8, fp8"):
        load_model(folder, weights="int4")
    with pytest.raises(ConfigError, match="caller's"):
        LLM(load_model(folder), weights="fp8")


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_quantized_models_whose_products_do_not_wait_for_the_host_are_captured(monkeypatch, weights):
    monkeypatch.setattr("openmimo.engine.worker.triton_unavailable", lambda on_cpu, dtype: None)
    monkeypatch.setattr("openmimo.engine.worker._experts_backend", lambda model, num_tokens: "triton")
    model = tiny_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    quantize_model(model, weights)
    assert "16 bits" in why_no_graphs(model, torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    assert why_no_graphs(model, torch.bfloat16) is None
    monkeypatch.setattr("openmimo.engine.worker._experts_backend", lambda model, num_tokens: "sorted_loop")
    assert "expert" in why_no_graphs(model, torch.bfloat16)
