"""The engine check finds planted faults of length, and none in the engine as it is."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import randomize, tiny_config
from tiny_checkpoint import save_tiny_checkpoint

from openmimo import cli
from openmimo.core.errors import ConfigError
from openmimo.engine import worker
from openmimo.engine.prefix import PrefixCache
from openmimo.engine.worker import PagedContext
from openmimo.evals import engine_check
from openmimo.evals.engine_check import EngineCheck, Row, judge
from openmimo.model.attention import RopeScaling
from openmimo.model.mimo import MiMo

LENGTH, SHORT_LENGTH, ORIGINAL = 600, 250, 256
TEXT_PARTS = {"one chunk", "chunks", "decoding", "prefix"}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(engine_check, "_ROWS_PER_OCTAVE", 4)
    monkeypatch.setattr(engine_check, "_CHUNK", 128)
    monkeypatch.setattr(engine_check, "DECODED", 20)


def window_off_by_one(monkeypatch):
    attend = PagedContext.attend

    def wrong(self, call):
        if call.window_keys is not None:
            call.window_keys -= 1
        return attend(self, call)

    monkeypatch.setattr(PagedContext, "attend", wrong)


def base_of_the_wrong_kind(monkeypatch):
    rotary = PagedContext.rotary
    full = tiny_config().layers[0].attention

    def wrong(self, spec, dtype):
        return rotary(self, full if spec.kind == "sliding" else spec, dtype)

    monkeypatch.setattr(PagedContext, "rotary", wrong)


def position_offset_after_a_prefix_hit(monkeypatch):
    start, bind = PrefixCache.start, PagedContext.bind
    hits = set()

    def remember(self, sequence):
        start(self, sequence)
        hits.add(sequence.num_computed_tokens)

    def wrong(self, step, **settings):
        bind(self, step, **settings)
        if step.starts[0] in hits - {0}:
            self._rotary_rows = slice(step.starts[0] + 1, step.stops[0] + 1)
        return self

    monkeypatch.setattr(PrefixCache, "start", remember)
    monkeypatch.setattr(PagedContext, "bind", wrong)


def lost_page(monkeypatch):
    bind = PagedContext.bind

    def wrong(self, step, **settings):
        groups = []
        for slots in step.groups:
            if slots is not None and slots.tables_BY[0].shape[1] > 4:
                tables = tuple(table.clone() for table in slots.tables_BY)
                for table in tables:
                    table[:, 3] = table[:, 2]
                slots = slots._replace(tables_BY=tables)
            groups.append(slots)
        return bind(self, step._replace(groups=tuple(groups)), **settings)

    monkeypatch.setattr(PagedContext, "bind", wrong)


def wrong_scale_beyond_the_original_length(monkeypatch):
    table = worker.rotary_table

    def wrong(positions, rotary_dim, theta, dtype, divisors, amplitude):
        rows = table(positions, rotary_dim, theta, dtype, divisors, amplitude)
        plain = table(positions, rotary_dim, theta, dtype)
        is_beyond = (positions >= ORIGINAL)[:, None]
        return tuple(torch.where(is_beyond, theirs, mine) for mine, theirs in zip(rows, plain, strict=True))

    monkeypatch.setattr(worker, "rotary_table", wrong)


def findings(config, length=LENGTH):
    model = randomize(MiMo(replace(config, max_positions=1024)), 5)
    return EngineCheck(model, length).run()


def wrong_parts(found):
    return {one.name for one in found if one.wrong is not None}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


CONFIG = tiny_config(mtp_heads=1)
EXTENDED = CONFIG.with_full_rope(None, RopeScaling("yarn", 8.0, ORIGINAL))


@pytest.mark.parametrize("config", [CONFIG, pytest.param(EXTENDED, marks=pytest.mark.slow)], ids=["plain", "yarn"])
def test_the_engine_equals_a_whole_pass(config):
    found = findings(config, SHORT_LENGTH if config is CONFIG else LENGTH)
    assert not wrong_parts(found)
    assert {one.name for one in found} == {"rotation, full layers", "rotation, sliding layers", "cache", *TEXT_PARTS}
    assert all(one.rows >= 20 for one in found)


@pytest.mark.parametrize(
    ("plant", "config", "parts"),
    [
        (window_off_by_one, CONFIG, TEXT_PARTS),
        slow(base_of_the_wrong_kind, CONFIG, {*TEXT_PARTS, "cache"}),
        slow(position_offset_after_a_prefix_hit, CONFIG, {"prefix"}),
        slow(lost_page, CONFIG, {"chunks", "decoding", "prefix"}),
        slow(wrong_scale_beyond_the_original_length, EXTENDED, {"rotation, full layers", "cache", *TEXT_PARTS}),
    ],
)
def test_a_planted_fault_is_found(plant, config, parts, monkeypatch):
    plant(monkeypatch)
    found = findings(config, SHORT_LENGTH if plant is window_off_by_one else LENGTH)
    assert parts <= wrong_parts(found)
    if plant is position_offset_after_a_prefix_hit:
        assert not wrong_parts(found) & {"one chunk", "chunks", "decoding"}
    if plant is wrong_scale_beyond_the_original_length:
        assert {one.wrong[0] >= ORIGINAL for one in found if one.wrong is not None} == {True}


def test_single_rows_may_differ_but_not_a_whole_range():
    rows = [Row(position, 0.0) for position in range(1, 64)] + [Row(position, 1.0) for position in range(64, 128)]
    assert judge("a", rows, 0.5).wrong == (64, 127)
    assert (
        judge("a", [*rows[:63], Row(70, 0.0), Row(71, 0.0), Row(72, 0.0), Row(73, 0.0), Row(74, 9.0)], 0.5).wrong
        is None
    )
    assert judge("a", [Row(5, float("nan"))], 0.5).wrong == (5, 5)


def test_lengths_above_the_positions_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match="at most 236"):
        EngineCheck(MiMo(replace(CONFIG, max_positions=256)), 256)
    folder = save_tiny_checkpoint(tmp_path)
    monkeypatch.setattr(sys, "argv", ["openmimo", "eval", "--engine-check", str(folder), "--length", "5000"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "at most 4076" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_command_prints_each_part_and_fails_on_a_difference(tmp_path, monkeypatch, capsys):
    folder = save_tiny_checkpoint(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["openmimo", "eval", "--engine-check", str(folder), "--length", "200"])
    cli.main()
    assert capsys.readouterr().out.count("equal") == 7
    window_off_by_one(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "differs at" in printed.out and "The engine differs from a whole pass" in " ".join(printed.err.split())
