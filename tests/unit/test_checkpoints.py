"""Loading, saving and converting: FP8 and fused layouts, shards, and faults of a checkpoint folder."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

import openmimo
from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.model.audit import audit
from openmimo.model.convert import ConvertConfig, checkpoint_layout, convert
from openmimo.model.mimo import MiMo
from openmimo.model.presets import flash, mimo_7b
from openmimo.model.weight_formats import dequantize_fp8


def quiet(total_bytes):
    return lambda num_bytes: None


def same(a: MiMo, b: MiMo) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


def real_dims_model() -> MiMo:
    """Two layers with the published head dims: the key rows of a rank end inside a block of scales."""
    config = tiny_config(num_layers=2, mtp_heads=1)
    full = replace(config.layers[0].attention, num_heads=8, num_kv_heads=4, key_dim=192, value_dim=128, rotary_dim=64)
    sliding = replace(full, kind="sliding", num_kv_heads=8, window_keys=9, sink=True)
    layers = (replace(config.layers[0], attention=full), replace(config.layers[1], attention=sliding))
    return randomize(MiMo(replace(config, layers=layers, mtp=replace(config.mtp, attention=sliding))), 0)


def test_round_trip_with_mtp_heads_over_many_shards(tmp_path):
    model = tiny_model(mtp_heads=3)
    openmimo.save_model(model, tmp_path / "m", max_shard_bytes=40_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 5
    assert same(model, openmimo.load_model(tmp_path / "m"))


def test_bfloat16_keeps_the_router_in_float32(tmp_path):
    openmimo.save_model(tiny_model(), tmp_path / "m")
    model = openmimo.load_model(tmp_path / "m", dtype="bfloat16")
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.float32
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(model.logits(torch.arange(40))).all()


def test_mimo_7b_layer_names_and_swapped_halves(tmp_path):
    attention = replace(tiny_config().layers[0].attention, sink=False)
    config = replace(
        mimo_7b(), vocab_size=160, hidden_size=64, dense_ffn_dim=96, mtp=replace(mimo_7b().mtp, attention=attention),
        layers=tuple(replace(layer, attention=attention) for layer in mimo_7b().layers[:2]),
    )  # fmt: skip
    model = randomize(MiMo(config), 0)
    openmimo.save_model(model, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    ours = model.model.mtp.layers[0].eh_proj.weight
    assert torch.equal(stored["model.mtp_layers.0.input_proj.weight"], torch.cat([ours[:, 64:], ours[:, :64]], dim=1))
    assert "model.mtp_layers.0.token_layernorm.weight" in stored
    assert same(model, openmimo.load_model(tmp_path / "m"))


@pytest.mark.parametrize("projections", ["split", "fused_qkv"])
def test_fp8_is_restored_to_its_rounding_error(tmp_path, projections):
    model = real_dims_model()
    openmimo.save_model(model, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "q", ConvertConfig(dtype="fp8", projections=projections), start=quiet)
    restored = openmimo.load_model(tmp_path / "q").state_dict()
    for name, tensor in model.state_dict().items():
        error = (restored[name] - tensor).norm() / tensor.norm()
        assert error < 0.03, f"{name}: relative error {error}"
        assert name.endswith(("o_proj.weight", "norm.weight")) or "gate" in name or error > 0 or "bias" in name


def test_fp8_full_layers_have_the_published_scale_layout(tmp_path):
    """K of a full layer: 4 ranks x 2 rows of scales, V: 4 x 1; K_r rows 128-191 and V_r rows 0-63 share one scale."""
    model = real_dims_model()
    model.model.layers[0].self_attn.v_proj.weight.data[::2] *= 10  # makes all scales different
    model.model.layers[0].self_attn.v_proj.weight.data[64:128] *= 10
    openmimo.save_model(model, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "q", ConvertConfig(dtype="fp8"), start=quiet)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    prefix = "model.layers.0.self_attn."
    assert stored[prefix + "k_proj.weight_scale_inv"].shape == (8, 1)
    assert stored[prefix + "v_proj.weight_scale_inv"].shape == (4, 1)
    k, v = model.model.layers[0].self_attn.k_proj.weight, model.model.layers[0].self_attn.v_proj.weight
    shared = torch.cat([k[192 + 128 : 2 * 192], v[128 : 128 + 64]]).abs().max() / 448
    assert torch.isclose(stored[prefix + "k_proj.weight_scale_inv"][3, 0], shared)
    # Uniform blocks would give another matrix.
    wrong = dequantize_fp8(stored[prefix + "v_proj.weight"], stored[prefix + "v_proj.weight_scale_inv"])
    right = openmimo.load_model(tmp_path / "q").model.layers[0].self_attn.v_proj.weight
    assert (wrong - right).norm() / right.norm() > 0.1


@pytest.mark.parametrize("kv_heads, key_dim, value_dim", [(1, 48, 32), (2, 96, 64), (2, 192, 128), (4, 192, 192)])
def test_fp8_survives_other_geometries(tmp_path, kv_heads, key_dim, value_dim):
    """For shapes that do not tell a grid per rank from a uniform grid, the uniform grid is written and read."""
    config = tiny_config(num_layers=2)
    full = replace(
        config.layers[0].attention,
        num_heads=4,
        num_kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        rotary_dim=8,
    )
    sliding = replace(full, kind="sliding", num_kv_heads=2 * kv_heads, num_heads=8, window_keys=9, sink=True)
    layers = (replace(config.layers[0], attention=full), replace(config.layers[1], attention=sliding))
    model = randomize(MiMo(replace(config, layers=layers)), 0)
    openmimo.save_model(model, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "q", ConvertConfig(dtype="fp8"), start=quiet)
    restored = openmimo.load_model(tmp_path / "q").state_dict()
    for name, tensor in model.state_dict().items():
        assert (restored[name] - tensor).norm() / tensor.norm() < 0.03, name


def test_a_scale_of_another_shape_is_refused(tmp_path):
    openmimo.save_model(real_dims_model(), tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "q", ConvertConfig(dtype="fp8"), start=quiet)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    tensors[name] = torch.ones(4, 8)
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    with pytest.raises(CheckpointError, match="up_proj.weight_scale_inv"):
        openmimo.load_model(tmp_path / "q")


def test_extension_of_full_mtp_heads_survives_a_round_trip(tmp_path):
    config = tiny_config(num_layers=2, mtp_heads=1)
    full = config.layers[0].attention
    layers = tuple(replace(layer, attention=full) for layer in config.layers)
    model = randomize(MiMo(replace(config, layers=layers, mtp=replace(config.mtp, attention=full))), 0)
    model.extend_context(full_rope_theta=7e4, max_positions=4096)
    openmimo.save_model(model, tmp_path / "m")
    loaded = openmimo.load_model(tmp_path / "m")
    assert loaded.config == model.config
    assert loaded.model.mtp.layers[0].self_attn.spec == model.model.mtp.layers[0].self_attn.spec


def test_save_refuses_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="notes.txt"):
        openmimo.save_model(tiny_model(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_weight_and_scale_may_lie_in_different_files(tmp_path):
    openmimo.save_model(real_dims_model(), tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "q", ConvertConfig(dtype="fp8"), start=quiet)
    expected = openmimo.load_model(tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    (tmp_path / "q" / "model.safetensors").unlink()
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    save_file(tensors, tmp_path / "q" / "a.safetensors")
    save_file(scales, tmp_path / "q" / "b.safetensors")
    assert same(expected, openmimo.load_model(tmp_path / "q"))


def test_fused_and_split_hold_the_same_weights(tmp_path):
    model = tiny_model(mtp_heads=1)
    openmimo.save_model(model, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "f", ConvertConfig(dtype="float32", projections="fused_qkv"), start=quiet)
    assert "model.layers.1.self_attn.qkv_proj.weight" in load_file(tmp_path / "f" / "model.safetensors")
    assert same(model, openmimo.load_model(tmp_path / "f"))
    convert(tmp_path / "f", tmp_path / "s", ConvertConfig(dtype="float32"), start=quiet)
    assert same(model, openmimo.load_model(tmp_path / "s"))


def test_audit_counts_the_published_checkpoint():
    result = audit(flash(), quantized=True)
    assert result.main == 308_778_780_864
    assert result.mtp_block == 329_273_408
    main = [name for name in result.shapes if not name.startswith("model.mtp")]
    assert (len(main), len(result.shapes) - len(main)) == (72_766, 60)
    expected = {
        "model.layers.5.self_attn.k_proj.weight": (768, 4096),
        "model.layers.5.self_attn.k_proj.weight_scale_inv": (8, 32),
        "model.layers.5.self_attn.v_proj.weight_scale_inv": (4, 32),
        "model.layers.1.self_attn.k_proj.weight_scale_inv": (12, 32),
        "model.layers.1.self_attn.attention_sink_bias": (64,),
        "model.layers.47.mlp.experts.255.down_proj.weight": (4096, 2048),
        "model.layers.47.mlp.experts.255.down_proj.weight_scale_inv": (32, 16),
        "model.layers.0.mlp.down_proj.weight_scale_inv": (32, 128),
        "model.mtp.layers.2.eh_proj.weight": (4096, 8192),
        "model.mtp.layers.2.pre_mlp_layernorm.weight": (4096,),
    }
    assert {name: result.shapes[name] for name in expected} == expected
    assert "model.mtp.layers.0.self_attn.o_proj.weight_scale_inv" not in result.shapes


def test_layout_lists_what_save_writes(tmp_path):
    model = tiny_model(mtp_heads=2)
    openmimo.save_model(model, tmp_path / "m")
    stored = {name: tuple(t.shape) for name, t in load_file(tmp_path / "m" / "model.safetensors").items()}
    assert stored == checkpoint_layout(model.config, quantized=False)


class TestBadCheckpoints:
    @pytest.fixture
    def folder(self, tmp_path):
        openmimo.save_model(tiny_model(), tmp_path / "m")
        return tmp_path / "m"

    def rewrite(self, folder, change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    def refused(self, folder) -> str:
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            openmimo.load_model(folder)
        with pytest.raises((CheckpointError, ConfigError)):
            convert(folder, folder.parent / "new", ConvertConfig(), start=quiet)
        assert not (folder.parent / "new").exists()
        return str(caught.value)

    def test_everything_that_does_not_fit_is_listed_at_once(self, folder):
        def change(tensors):
            tensors["model.extra"] = tensors.pop("model.norm.weight")
            tensors["lm_head.weight"] = tensors["lm_head.weight"][:5].contiguous()
            name = "model.layers.1.mlp.experts.3.up_proj.weight"
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.int32)

        self.rewrite(folder, change)
        message = self.refused(folder)
        for part in ("model.norm.weight", "model.extra", "[5, 64]", "experts.3.up_proj.weight_scale_inv", "dtype I32"):
            assert part in message

    def test_a_truncated_file_is_named(self, folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
        message = self.refused(folder)
        assert "model.safetensors" in message
        assert "truncated" in message

    def test_a_missing_shard_is_named(self, folder):
        index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "model-00002-of-00002.safetensors" in self.refused(folder)

    def test_an_unknown_config_key_is_named(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"swiglu_limit": 7.0}))
        assert "swiglu_limit" in self.refused(folder)

    def test_a_missing_or_broken_config_is_named(self, folder):
        (folder / "config.json").write_text("{")
        assert "config.json" in self.refused(folder)
        (folder / "config.json").unlink()
        assert "config.json" in self.refused(folder)

    def test_a_folder_that_is_not_there(self, tmp_path):
        assert "nowhere" in self.refused(tmp_path / "nowhere")

    def test_a_failed_save_leaves_the_old_checkpoint(self, folder, monkeypatch):
        import openmimo.model.hf_files as writer

        def full_disk(*args, **kwargs):
            raise OSError(28, "No space left on device")

        before = (folder / "model.safetensors").read_bytes()
        monkeypatch.setattr(writer, "save_file", full_disk)
        with pytest.raises(OSError, match="No space"):
            openmimo.save_model(tiny_model(1), folder)
        assert (folder / "model.safetensors").read_bytes() == before
        assert [path.name for path in folder.parent.iterdir()] == ["m"]
