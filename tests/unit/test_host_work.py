"""Host work and memory of the engine grow at most linearly with the length of a text."""

import math
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import rl_world
import torch
from conftest import tiny_config, tiny_model
from sampled_rows import Draw, sample

from openmimo.core.records import Request, SamplingParams
from openmimo.data.tokenizer import StreamDecoder
from openmimo.engine.cache import PageArena, PageTables
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.engine.prefix import PrefixCache
from openmimo.engine.request_state import Decision, RepeatCounter, RequestState, RoutedRows, TextStream
from openmimo.engine.worker import RotaryRows
from openmimo.kernels.attention import AttentionNeed, packed_rows
from openmimo.kernels.operations import rotary_table

SPEC = tiny_config().layers[0].attention


def test_routed_rows_copy_each_row_once(monkeypatch):
    copied, real = [], np.concatenate
    monkeypatch.setattr(np, "concatenate", lambda arrays: copied.append(sum(map(len, arrays))) or real(arrays))
    rows = RoutedRows()
    for position in range(4000):
        rows.append(np.full((1, 2, 3), position % 200, dtype=np.uint8))
    assert len(rows) == 4000 and 3900 < sum(copied) <= 4000 and len(copied) < 100
    assert rows.between(3990, 4000)[:, 1, 2].tolist() == [position % 200 for position in range(3990, 4000)]
    assert rows.between(10, 300)[:, 0, 1].tolist() == [position % 200 for position in range(10, 300)]
    assert rows.array()[:, 1, 1].tolist() == [position % 200 for position in range(4000)]


def test_the_next_turn_of_a_session_continues_the_rows_of_the_last():
    first = RoutedRows()
    first.append(np.full((70, 2, 3), 1, dtype=np.uint8))
    first.append(np.full((3, 2, 3), 2, dtype=np.uint8))
    second = first.continued()
    second.append(np.full((5, 2, 3), 3, dtype=np.uint8))
    assert second.array()[:, 0, 0].tolist() == [1] * 70 + [2] * 3 + [3] * 5
    assert first.array()[:, 0, 0].tolist() == [1] * 70 + [2] * 3
    assert second.between(68, 76)[:, 0, 0].tolist() == [1, 1, 2, 2, 2, 3, 3, 3]


def test_recorded_routing_reads_a_block_at_a_time(monkeypatch):
    """Each block that the prefix tree adds reads its own rows, not all rows so far."""
    read, real = [], RoutedRows.between
    monkeypatch.setattr(RoutedRows, "between", lambda self, a, b: read.append(b - a) or real(self, a, b))
    engine = Engine(tiny_model(1), config=EngineConfig())
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True, routed_experts=True)
    sequence = engine.submit(Request("1", tuple(range(20)), params))
    while engine.has_work:
        engine.step()
    assert len(read) >= 200 // engine.arena.layout.block_positions
    assert sum(read) <= 4 * len(sequence.tokens)
    assert sequence.completion().routed_experts.shape[0] == len(sequence.tokens) - 1


def test_a_prompt_that_has_no_room_is_not_matched_in_every_step(monkeypatch):
    matched, real = [], PrefixCache.start
    monkeypatch.setattr(PrefixCache, "start", lambda self, s: matched.append(s.request.id) or real(self, s))
    length, roomy = 300, Engine(tiny_model(1))
    cache_bytes = (roomy.scheduler.pages_at_most(length + 100) + 1) * roomy.arena.page_bytes
    engine = Engine(tiny_model(1), config=EngineConfig(cache_gigabytes=cache_bytes / 2**30))
    params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    ids = [tuple(int(token) for token in np.random.default_rng(seed).integers(0, 160, length)) for seed in (0, 1)]
    first, second = (engine.submit(Request(str(number), prompt, params)) for number, prompt in enumerate(ids))
    steps = 0
    while not first.finish_reason:
        engine.step()
        steps += second.pages is None
    while engine.has_work:
        engine.step()
    assert steps > 60 and 2 <= matched.count("1") <= math.log2(steps / 8) + 3
    assert len(second.tokens) == length + 100


def test_held_pages_are_counted_once():
    arena = PageArena(tiny_config().attention_layers(), cache_bytes=1 << 20)
    tables = [PageTables(arena, 0) for _ in range(2)]
    tables[0].reach(100)
    full = next(i for i, group in enumerate(arena.layout.groups) if group.spec.keep_positions is None)
    tables[1].adopt(full, tables[0].table(full).ravel().tolist())
    is_held = np.zeros(arena.num_pages, dtype=bool)
    for table in tables:
        table.mark_held(is_held)
    assert is_held.sum() == arena.num_used == len(set(tables[0].held())) == tables[0].num_pages


def test_masks_of_a_decoding_pass_do_not_grow_with_the_text():
    packed_rows._hidden_from.cache_clear()
    q, generator = torch.randn(4, 8, 24), torch.Generator().manual_seed(0)
    for keys in range(500, 600):
        k, v = torch.randn(keys, 2, 24, generator=generator), torch.randn(keys, 2, 16, generator=generator)
        need = AttentionNeed((4,), (keys,), 8, 2, 24, 16, None, False, False, torch.float32, True)
        found = packed_rows.run(q, k, v, None, need=need, scale=24**-0.5).out_TNV
    assert packed_rows._hidden_from.cache_info().currsize == 1
    logits = torch.einsum("tgrk,sgk->grts", q.view(4, 2, 4, 24), k) * 24**-0.5
    hidden = torch.arange(keys) > torch.arange(keys - 4, keys)[:, None]
    expected = torch.einsum("grts,sgv->tgrv", logits.masked_fill(hidden, float("-inf")).softmax(-1), v).reshape(
        4, 8, 16
    )
    assert (found - expected).abs().max() < 1e-5


def test_rotation_tables_grow_by_new_rows_only(monkeypatch):
    computed = []

    def table(positions, *arguments):
        computed.append(len(positions))
        return rotary_table(positions, *arguments)

    monkeypatch.setattr("openmimo.engine.worker.rotary_table", table)
    rows = RotaryRows("cpu", 300_000)
    first, _ = rows.tables(SPEC, torch.float32, 1)
    for length in (10, 700, 1500, 3000, 200_001):
        cos, sin = rows.tables(SPEC, torch.float32, length)
    known = sum(computed)
    assert 200_001 <= known < 1.1 * 200_001 and max(computed) <= 1 << 16
    assert cos.data_ptr() == first.data_ptr()  # a captured graph keeps the address
    cos, sin = cos[:known], sin[:known]
    expected = rotary_table(torch.arange(known), SPEC.rotary_dim, SPEC.rope_theta, torch.float32)
    assert torch.equal(cos, expected[0]) and torch.equal(sin, expected[1])


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9, "top_k": 50, "min_p": 0.001}], ids=["plain", "filtered"])
def test_distributions_are_made_for_some_rows_at_a_time(monkeypatch, filters):
    """A row's result does not depend on the rows computed with it."""
    sizes, real = [], torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda self: sizes.append(self.numel()) or real(self))
    logits = torch.randn(90, 50_000, generator=torch.Generator().manual_seed(0))
    draws = [Draw(SamplingParams(temperature=0.8, **filters), seed, 3) for seed in range(90)]
    together = sample(logits, draws)
    assert max(sizes) <= 1 << 21 and sum(sizes) == logits.numel()
    alone = [sample(logits[row : row + 1], [draws[row]])[0] for row in range(0, 90, 9)]
    assert together[::9] == alone


def test_a_refused_prompt_is_tried_again_once_another_ends():
    """Its tokens do not depend on the number of attempts."""
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    alone = Engine(tiny_model(1))
    expected = alone.submit(Request("x", tuple(range(80)), params))
    while alone.has_work:
        alone.step()
    engine = Engine(tiny_model(1), config=replace(EngineConfig(), cache_gigabytes=0.0006))
    sequences = [engine.submit(Request(str(n), tuple(range(80)), params)) for n in range(4)]
    while engine.has_work:
        engine.step()
    assert all(sequence.tokens == expected.tokens for sequence in sequences)


def engine_bookkeeping(num_tokens: int, max_repeats: int = 0) -> tuple[int, RequestState]:
    """Counts the Python calls and lines that confirm tokens and add them to the prefix tree, without a model."""
    arena = PageArena(tiny_config().attention_layers(), cache_bytes=1 << 26)
    prefix = PrefixCache(arena)
    params = SamplingParams(max_tokens=num_tokens, logprobs=True, max_repeats=max_repeats, routed_experts=True)
    text = TextStream(StreamDecoder(rl_world.tokenizer()), stop=("never",))
    state = RequestState(Request("1", (5,), params), [5], 0, num_tokens + 1, frozenset(), text=text)
    state.pages = PageTables(arena, 0)
    prefix.start(state)
    state.pages.reach(num_tokens + 1, spare_pages=arena.num_pages)
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += 1
        return trace

    rows = np.zeros((1, 2, 3), np.uint8)
    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        for token in range(num_tokens):
            state.add(Decision(token % 89, -0.5), drafted=False, policy_version=3)
            state.routing.append(rows)
            state.num_computed_tokens = len(state.tokens) - 1
            prefix.extend(state)
            state.take_delta()
    finally:
        sys.settrace(previous)
    return count, state


@pytest.mark.parametrize("max_repeats", [0, 4])
def test_twice_the_tokens_are_twice_the_work_of_the_engine(max_repeats):
    short, long = (engine_bookkeeping(length, max_repeats)[0] for length in (1000, 2000))
    assert long < 2.1 * short


def test_what_a_request_holds_per_token_is_small():
    _, state = engine_bookkeeping(2000)
    arrays = (state.logprobs, state.policy_versions, state.drafted, state.blocks)
    assert sum(map(sys.getsizeof, arrays)) < 20 * 2000
    assert state.completion().policy_versions == [3] * 2000


@pytest.mark.parametrize("times", [2, 3, 5])
def test_repetitions_are_found_where_comparing_whole_passages_finds_them(times):
    def is_repeating(tokens):
        lengths = range(1, min(64, len(tokens) // times) + 1)
        return any(tokens[-n * times : -n] == tokens[-n * (times - 1) :] for n in lengths)

    rng = random.Random(times)
    for _ in range(60):
        passage = [rng.randrange(4) for _ in range(rng.randrange(1, 70))]
        tokens = [rng.randrange(4) for _ in range(rng.randrange(20))] + passage * (times + 1)
        counter = RepeatCounter(times)
        for end, token in enumerate(tokens, 1):
            assert counter.add(token) == is_repeating(tokens[:end])


def test_uses_of_a_prefix_count_for_what_is_above_it():
    """A use updates one node only; the order of eviction still follows the last use of each whole text."""
    engine = Engine(tiny_model(1), config=EngineConfig())
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    texts = [tuple(int(token) for token in np.random.default_rng(seed).integers(0, 160, 130)) for seed in (0, 1)]
    for number, text in enumerate([*texts, texts[0]]):
        engine.submit(Request(str(number), text, params))
        while engine.has_work:
            engine.step()
    engine.prefix._pass_on_uses()
    last_use = {text: [] for text in texts}
    for text in texts:
        node = engine.prefix._root
        while node.children:
            (node,) = [own for own in node.children.values() if own.tokens == _block(text, own.depth, engine)]
            last_use[text].append(node.last_use)
    assert len(last_use[texts[0]]) > 2
    assert min(last_use[texts[0]]) > max(last_use[texts[1]])


def _block(text, depth, engine):
    size = engine.arena.layout.block_positions
    return np.array(text[(depth - 1) * size : depth * size], np.int32).tobytes()
