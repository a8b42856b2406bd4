"""The cache against an oracle that never forgets: what a call reads, what is kept, what can be taken back."""

import random

import pytest
import torch
from conftest import tiny_config

from openmimo.engine.cache import KVCache, LayerCache, all_global_cache_bytes
from openmimo.model.attention import KVSpec

HEADS, KEY_DIM, VALUE_DIM = 2, 3, 4


def _layer(keep_positions, *, max_positions=500, slack_rows=16):
    spec = KVSpec(HEADS, KEY_DIM, VALUE_DIM, keep_positions)
    return LayerCache(spec, max_positions=max_positions, slack_rows=slack_rows, dtype=torch.float32, device="cpu")


def _rows(positions, generation):
    """Keys and values that tell which position wrote them, and in which attempt."""
    numbers = torch.tensor([position + 1000.0 * generation for position in positions])[:, None, None]
    return numbers.expand(-1, HEADS, KEY_DIM), -numbers.expand(-1, HEADS, VALUE_DIM)


@pytest.mark.parametrize("keep_positions", [None, 0, 8, 31])
@pytest.mark.parametrize("seed", range(4))
def test_a_call_reads_the_window_and_itself(keep_positions, seed):
    """Appends of all sizes, and take-backs of up to a verification's worth, as speculation does them."""
    chance = random.Random(seed)
    layer = _layer(keep_positions)
    keys, values = torch.empty(0, HEADS, KEY_DIM), torch.empty(0, HEADS, VALUE_DIM)
    for generation in range(60):
        count = chance.choice([1, 1, 2, 4, 4, 20 if generation < 10 else 4])
        k, v = _rows(range(layer.length, layer.length + count), generation)
        keys, values = torch.cat([keys, k]), torch.cat([values, v])
        past = layer.length if keep_positions is None else min(keep_positions, layer.length)
        read_keys, read_values = layer.append(k, v)
        assert torch.equal(read_keys, keys[len(keys) - count - past :])
        assert torch.equal(read_values, values[len(values) - count - past :])
        assert read_keys.is_contiguous() and read_values.is_contiguous()
        kept = chance.randint(0, count) if count <= 4 else count
        layer.truncate(layer.length - count + kept)
        keys, values = keys[: len(keys) - count + kept], values[: len(values) - count + kept]
        assert layer.length == len(keys)


def test_a_long_prompt_in_one_append():
    layer = _layer(8)
    k, v = _rows(range(200), 0)
    assert torch.equal(layer.append(k, v)[0], k)
    assert layer.kept_positions == 24
    layer.truncate(184)
    k_next, v_next = _rows([184], 1)
    assert torch.equal(layer.append(k_next, v_next)[0], torch.cat([k[176:184], k_next]))


def test_what_is_gone_cannot_come_back():
    layer = _layer(8)
    layer.append(*_rows(range(200), 0))
    with pytest.raises(AssertionError, match="cannot go"):
        layer.truncate(183)
    with pytest.raises(AssertionError, match="cannot go"):
        layer.truncate(201)
    full = _layer(None, max_positions=10)
    full.append(*_rows(range(10), 0))
    full.truncate(0)
    with pytest.raises(AssertionError, match="10 positions"):
        full.append(*_rows(range(11), 0))


def test_sliding_layers_hold_their_window_only():
    """Bytes by hand, far beyond the window: full layers hold every position, sliding ones their window and slack."""
    config = tiny_config(window_keys=32, num_layers=7)
    cache = KVCache(config.attention_layers(), max_positions=1000)
    for index, spec in enumerate(config.attention_layers()):
        for _ in range(10):
            k = torch.zeros(100, spec.num_kv_heads, spec.key_dim)
            cache.append(index, k, torch.zeros(100, spec.num_kv_heads, spec.value_dim))
    full_position, sliding_position = 2 * (24 + 16) * 4, 4 * (24 + 16) * 4
    window_and_slack = 31 + 16
    assert cache.num_bytes == 2 * 1000 * full_position + 5 * window_and_slack * sliding_position
    assert [layer.kept_positions for layer in cache.layers] == [1000, *[window_and_slack] * 4, 1000, window_and_slack]
    assert cache.all_global_bytes == 7 * 1000 * full_position


def test_a_cache_grows_with_its_sequence():
    """A request that may become long does not pay for it before it is."""
    layer = _layer(None, max_positions=100_000)
    layer.append(*_rows(range(70), 0))
    assert layer.num_bytes == 128 * HEADS * (KEY_DIM + VALUE_DIM) * 4


def test_all_global_bytes_of_the_published_model():
    """The report's near sixfold saving: 256K positions of the 309B model in bfloat16."""
    from openmimo.model.presets import flash

    layers = flash().attention_layers()[:48]
    hybrid_at_256k = 9 * 262144 * 4 * 320 * 2 + 39 * 128 * 8 * 320 * 2
    assert 5.3 < all_global_cache_bytes(layers, 262144, torch.bfloat16) / hybrid_at_256k < 6
