"""The shapes of one tensor-parallel rank: the sum of the ranks' outputs is the output of the whole model."""

from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_config

from openmimo.core import config as config_io
from openmimo.core.errors import ConfigError
from openmimo.model.backbone import Backbone
from openmimo.model.config import ModelConfig
from openmimo.model.context import PackedContext
from openmimo.model.mimo import MiMo
from openmimo.model.presets import flash

LENGTHS = (30, 11)


def inputs() -> torch.Tensor:
    return torch.randn(sum(LENGTHS), 64, generator=torch.Generator().manual_seed(0))


def part(tensor: torch.Tensor, num_heads: int, rank: int, tp: int) -> torch.Tensor:
    """Returns the rows of a rank: its heads, or the one head that it shares with other ranks."""
    heads = tensor.unflatten(0, (num_heads, -1))
    count = max(num_heads // tp, 1)
    first = rank * num_heads // tp
    return heads[first : first + count].flatten(0, 1)


def fill_attention(local, whole, rank: int, tp: int) -> None:
    spec = whole.spec
    for name, heads in (("q_proj", spec.num_heads), ("k_proj", spec.num_kv_heads), ("v_proj", spec.num_kv_heads)):
        for own, other in zip(getattr(local, name).parameters(), getattr(whole, name).parameters(), strict=True):
            own.copy_(part(other, heads, rank, tp))
    local.o_proj.weight.copy_(whole.o_proj.weight.chunk(tp, dim=1)[rank])
    if spec.sink:
        local.attention_sink_bias.copy_(whole.attention_sink_bias.chunk(tp)[rank])


def fill_ffn(local, whole, rank: int, tp: int) -> None:
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        getattr(local, name).weight.copy_(getattr(whole, name).weight.chunk(tp, dim=dim)[rank])


@torch.no_grad()
@pytest.mark.parametrize("tp", [2, 4, 8])  # full layers have 2 key/value heads, sliding ones 4
def test_outputs_of_the_ranks_add_up(tp):
    config = replace(tiny_config(mtp_heads=1), attention_bias=True)
    whole = randomize(MiMo(config), 0)
    x_TD = inputs()
    sums: dict[str, torch.Tensor] = {}
    for rank in range(tp):
        local = MiMo(config.local(tp=tp))
        for index in (0, 1):
            fill_attention(local.model.layers[index].self_attn, whole.model.layers[index].self_attn, rank, tp)
            out = local.model.layers[index].self_attn(x_TD, PackedContext(LENGTHS))
            sums[f"attention {index}"] = sums.get(f"attention {index}", 0) + out
        block = local.model.mtp.layers[0]
        fill_attention(block.self_attn, whole.model.mtp.layers[0].self_attn, rank, tp)
        sums["mtp"] = sums.get("mtp", 0) + block.self_attn(x_TD, PackedContext(LENGTHS))
        fill_ffn(local.model.layers[0].mlp, whole.model.layers[0].mlp, rank, tp)
        sums["ffn"] = sums.get("ffn", 0) + local.model.layers[0].mlp(x_TD)
    layers = whole.model.layers
    expected = {f"attention {index}": layers[index].self_attn(x_TD, PackedContext(LENGTHS)) for index in (0, 1)}
    expected["mtp"] = whole.model.mtp.layers[0].self_attn(x_TD, PackedContext(LENGTHS))
    expected["ffn"] = layers[0].mlp(x_TD)
    for name, out in expected.items():
        assert torch.allclose(sums[name], out, atol=1e-4, rtol=1e-4), name


def heads_of(config: ModelConfig) -> list[tuple[int, int]]:
    return [(spec.num_heads, spec.num_kv_heads) for spec in (config.layers[0].attention, config.layers[1].attention)]


def test_key_value_heads_are_divided_or_replicated():
    assert heads_of(flash()) == [(64, 4), (64, 8)]
    assert heads_of(flash().local(tp=4)) == [(16, 1), (16, 2)]
    assert heads_of(flash().local(tp=8)) == [(8, 1), (8, 1)]
    assert flash().local(tp=8).mtp.attention.num_heads == 8
    assert flash().local(tp=8).dense_ffn_dim == flash().dense_ffn_dim // 8
    assert flash().local(tp=8).moe == flash().moe
    assert flash().local(tp=1) == flash()


@pytest.mark.parametrize(
    ("tp", "message"),
    [(3, "layer 0 has 8 heads.*layer 0 has 2 key/value heads"), (64, "dense_ffn_dim is 96"), (0, "at least 1")],
)
def test_what_does_not_divide_is_named(tp, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config().local(tp=tp)


@torch.no_grad()
def test_some_layers_of_a_backbone_are_the_layers_of_the_whole():
    """Two pipeline stages keep the indices, parameter names and routes of the whole model."""
    config = tiny_config()
    whole = randomize(MiMo(config), 0).model
    names = dict(whole.named_parameters())
    x_TD, context = inputs(), PackedContext(LENGTHS)
    context.routing.record = True
    expected = whole(x_TD, context)
    other = PackedContext(LENGTHS)
    other.routing.record = True
    states_TD, routers = x_TD, {}
    for indices in (range(3), range(3, 5)):
        stage = Backbone(config, indices)
        stage.load_state_dict(whole.state_dict(), strict=False)
        assert {name for name, _ in stage.named_parameters()} <= set(names)
        hidden = stage(states_TD, other)
        states_TD = hidden.pre_norm_TD
        routers.update(stage.routers())
    assert torch.equal(hidden.post_norm_TD, expected.post_norm_TD)
    assert set(routers) == set(whole.routers())
    assert {layer: ids.tolist() for layer, ids in other.routing.recorded.items()} == {
        layer: ids.tolist() for layer, ids in context.routing.recorded.items()
    }


def test_a_config_with_the_former_name_of_the_mtp_layers_is_read():
    values = config_io.to_dict(tiny_config(mtp_heads=2))
    values["mtp"]["num_heads"] = values["mtp"].pop("num_layers")
    assert config_io.from_dict(ModelConfig, values, "config.json") == tiny_config(mtp_heads=2)
