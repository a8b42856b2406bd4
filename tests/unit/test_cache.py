"""Pages, tables and prefixes: allocation, release, and bytes compared with the ideal."""

import pytest
import torch
from conftest import tiny_config

from openmimo.engine.cache import PageArena, PageTables, all_global_cache_bytes, plan_pages
from openmimo.model.presets import deep, flash, small, tiny

MARGIN = 3


def _arena(config, pages=400, dtype=torch.float32):
    layers = config.attention_layers()
    page_bytes = plan_pages(layers).page_numbers * dtype.itemsize
    return PageArena(layers, cache_bytes=pages * page_bytes, dtype=dtype)


@pytest.mark.parametrize("page_positions", [16, 32, 64, 128])
@pytest.mark.parametrize("preset", [tiny, small, flash, deep])
def test_every_layer_has_a_place_and_pages_are_equal(preset, page_positions):
    layers = preset().attention_layers()
    layout = plan_pages(layers, page_positions)
    assert sorted(layer for group in layout.groups for layer in group.layers) == list(range(len(layers)))
    for group in layout.groups:
        numbers = len(group.layers) * group.page_positions * group.spec.bytes_per_position(1)
        assert group.page_positions in (16, 32, 64, 128)
        least = 0.9 if page_positions > 16 else 0.7  # sliding layers have at least 16 positions
        assert least * layout.page_numbers < numbers / group.num_parts <= layout.page_numbers
        assert layout.block_positions % group.page_positions == 0


def test_layers_that_share_pages_never_overlap_in_them():
    arena = _arena(small(), pages=5)
    for place in set(arena.place_of_layer):
        layers = [layer for layer, other in enumerate(arena.place_of_layer) if other == place]
        for side in (0, 1):
            for layer in layers:
                arena.layer(layer)[side].fill_(1 + layer + 100 * side)
        for side in (0, 1):
            for layer in layers:
                assert (arena.layer(layer)[side] == 1 + layer + 100 * side).all()


@pytest.mark.parametrize(
    "lengths", [[200, 500, 1000, 2000, 4000, 8000, 16000, 64000], range(50, 4000, 37)], ids=["long", "short"]
)
@pytest.mark.parametrize("preset", [flash, small])
def test_bytes_are_within_five_percent_of_the_ideal_at_mixed_lengths(preset, lengths):
    """A length of 16K needs less than a quarter of the cache of a model of full layers (paper table 1)."""
    config = preset()
    arena = _arena(config, pages=1, dtype=torch.bfloat16)
    held = sum(arena.pages_for(length, 0) for length in lengths) * arena.page_bytes
    ideal = sum(arena.ideal_bytes(length) for length in lengths)
    assert ideal <= held <= 1.05 * ideal
    assert all_global_cache_bytes(config.attention_layers(), 16000, torch.bfloat16) > 4 * arena.ideal_bytes(16000)


def test_a_table_reaches_forward_and_leaves_behind():
    config = tiny()
    arena = _arena(config)
    pages = PageTables(arena, MARGIN)
    length = 0
    for step in (1, 1, 40, 3, 1, 100, 1, 1, 250):
        length += step
        missing, free = pages.missing(length), arena.num_free
        pages.reach(length)
        assert free - arena.num_free == missing
        pages.leave_behind(length)
        assert pages.num_pages == arena.num_used
        assert pages.num_pages == arena.pages_for(length, MARGIN)
        for number, group in enumerate(arena.layout.groups):
            keep = group.spec.keep_positions
            for position in range(0 if keep is None else max(length - keep - MARGIN, 0), length):
                assert (pages.table(number)[position // group.page_positions] >= 0).all()
    pages.release()
    assert arena.num_used == 0


def test_a_long_prompt_takes_pages_for_its_window_only_unless_there_are_spare_ones():
    arena = _arena(tiny())
    pages = PageTables(arena, MARGIN)
    pages.reach(300)
    assert pages.num_pages == arena.pages_for(300, MARGIN)
    generous = PageTables(arena, MARGIN)
    spare_rows = 3 * max(group.num_parts for group in arena.layout.groups)
    generous.reach(300, spare_pages=spare_rows)
    assert generous.num_pages == pages.num_pages + spare_rows
    generous.leave_behind(300)
    assert generous.num_pages == pages.num_pages


def test_shared_pages_stay_until_the_last_holder_goes():
    arena = _arena(tiny_config())
    page = arena.take()
    arena.share(page)
    arena.release(page)
    assert arena.num_used == 1
    arena.release(page)
    assert arena.num_used == 0


def test_a_page_is_neither_freed_twice_nor_taken_from_an_empty_arena():
    arena = _arena(tiny_config(), pages=1)
    page = arena.take()
    with pytest.raises(AssertionError, match="empty"):
        arena.take()
    arena.release(page)
    with pytest.raises(AssertionError, match="not held"):
        arena.release(page)
    with pytest.raises(AssertionError, match="not held"):
        arena.share(page)
