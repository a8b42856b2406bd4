"""Expert load: traces, errors against the sampling floor, the detector on known drifts, placements against search."""

import itertools
import sys

import numpy as np
import pytest

from benchmarks.synthetic_load import drawn_trace, drift, random_shares
from openmimo import cli
from openmimo.core.errors import ConfigError
from openmimo.core.load_trace import TRACE_FILE, LoadTraceWriter, read_load_trace
from openmimo.parallel.expert_load.comparison import ORACLE, STATIC, Devices, compare_placements
from openmimo.parallel.expert_load.config import DetectorConfig, ExpertsConfig
from openmimo.parallel.expert_load.forecast import backtest, error_of, noise_floor
from openmimo.parallel.expert_load.page import write_page
from openmimo.parallel.expert_load.placement import balanced, device_loads, max_over_mean, optimal
from openmimo.parallel.expert_load.state import detect_state

COUNTS = np.array([[[1, 2, 3], [3, 3, 0]], [[6, 0, 0], [2, 2, 2]], [[0, 0, 6], [1, 4, 1]]])


def writer(folder, **changes):
    settings = {"layers": [1, 4], "num_experts": 3, "experts_per_token": 2, "most_tokens": 300, "after_step": 0}
    return LoadTraceWriter(folder, **settings | changes)


@pytest.fixture
def written(tmp_path):
    trace = writer(tmp_path)
    for step, counts in enumerate(COUNTS, start=1):
        trace.write(step, counts)
    return tmp_path


class TestTraces:
    def test_what_was_written_is_read(self, written):
        trace = read_load_trace(written)
        assert trace.steps.tolist() == [1, 2, 3] and (trace.counts == COUNTS).all()
        assert trace.header.layers == (1, 4) and trace.header.dtype == "uint16"
        assert trace.slots.tolist() == [[6, 6]] * 3
        assert trace.shares[0, 0].tolist() == [1 / 6, 2 / 6, 3 / 6]

    def test_a_record_takes_the_bytes_of_its_counts(self, written):
        size = (written / TRACE_FILE).stat().st_size
        writer(written, after_step=3).write(4, COUNTS[0])
        assert (written / TRACE_FILE).stat().st_size - size == 8 + 2 * COUNTS[0].size

    def test_a_resumed_run_repeats_steps_and_a_record_cut_short_is_left_out(self, written):
        with open(written / TRACE_FILE, "ab") as file:
            file.write(b"\x04\0\0")
        assert read_load_trace(written).steps.tolist() == [1, 2, 3]
        writer(written, after_step=2).write(3, COUNTS[0])
        trace = read_load_trace(written)
        assert trace.steps.tolist() == [1, 2, 3] and (trace.counts[2] == COUNTS[0]).all()

    @pytest.mark.parametrize(
        "changes", [{"layers": [1, 5]}, {"num_experts": 4}, {"experts_per_token": 1}, {"most_tokens": 100_000}]
    )
    def test_a_trace_of_another_run_is_not_continued(self, written, changes):
        with pytest.raises(ConfigError, match="is a trace of"):
            writer(written, **changes)
        assert len(read_load_trace(written).steps) == 3

    @pytest.mark.parametrize(
        "content",
        [
            b"", b"\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b"x" * 100_000, b'{"format": "openmimo expert load"}\n',
            *(
                b'{"format": "openmimo expert load", "layers": %s, "num_experts": %s, "experts_per_token": %s, '
                b'"dtype": "%s"}\n' % values
                for values in [
                    (b"[]", b"3", b"1", b"uint8"), (b"[1]", b"0", b"1", b"uint8"), (b"[1]", b"3", b"4", b"uint8"),
                    (b"[1]", b"3", b"1", b"O"), (b"[-1]", b"3", b"1", b"uint8"), (b"[1]", b"1e9", b"1", b"uint8"),
                    (b"[1]", b"99999999999", b"1", b"uint8"), (b"[true]", b"3", b"1", b"uint8"),
                    (b'"ab"', b"3", b"1", b"uint8"),
                ]
            ),
        ],
        ids=range(16),
    )  # fmt: skip
    def test_a_damaged_file_is_refused_by_name(self, tmp_path, content, capsys, monkeypatch):
        (tmp_path / TRACE_FILE).write_bytes(content)
        monkeypatch.setattr(sys, "argv", ["openmimo", "experts", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1 and TRACE_FILE in capsys.readouterr().err.replace("\n", "")

    def test_steps_that_fall_are_damage(self, written):
        trace = writer(written, after_step=3)
        trace.write(2, COUNTS[0])
        with pytest.raises(ConfigError, match="do not rise"):
            read_load_trace(written)

    def test_a_run_without_a_trace_names_the_option(self, tmp_path):
        with pytest.raises(ConfigError, match="--expert-trace"):
            read_load_trace(tmp_path)


class TestErrors:
    def test_the_floor_is_that_of_simulated_draws(self):
        """One expert per token with unequal shares; two different experts per token with equal shares."""
        shares, rng = random_shares(8, spread=1.0, seed=0)[0], np.random.default_rng(0)
        drawn = rng.multinomial(1024, shares, size=20_000) / 1024
        simulated = np.abs(drawn - shares).mean(axis=0) / shares
        assert simulated == pytest.approx(noise_floor(shares, 1024), rel=0.03)
        published = np.sqrt(2 / np.pi) * np.sqrt((1 - shares) / (shares * 1024))
        assert noise_floor(shares, 1024) == pytest.approx(published)
        chosen = np.argpartition(rng.random((4000, 128, 8)), 1, axis=-1)[..., :2]
        shares_of = (chosen.reshape(4000, -1)[..., None] == np.arange(8)).mean(axis=1)
        simulated = np.abs(shares_of - 1 / 8).mean() * 8
        assert simulated == pytest.approx(noise_floor(np.array(1 / 8), 256, 2), rel=0.03)
        assert simulated < 0.95 * noise_floor(np.array(1 / 8), 256)  # one expert per token would have a larger floor

    def test_a_perfect_forecast_is_at_the_floor_and_the_last_value_above_it_by_root_two(self):
        shares = np.tile(random_shares(16, spread=0.5, seed=1), (2000, 1, 1))
        trace = drawn_trace(shares, tokens=2048, seed=0)
        perfect = error_of(shares[:1], trace.shares, trace.slots, 1)
        assert perfect.step_L == pytest.approx(perfect.step_floor_L, rel=0.02)
        assert perfect.horizon_floor_L == pytest.approx(perfect.step_floor_L / 2000**0.5)
        last = [error_of(trace.shares[place : place + 1], trace.shares, trace.slots, 1).step_L for place in range(50)]
        assert np.mean(last) == pytest.approx(2**0.5 * perfect.step_floor_L[0], rel=0.05)

    def test_the_last_horizon_ends_with_the_trace(self):
        trace = drawn_trace(np.full((70, 1, 2), 0.5), tokens=10, seed=0)
        assert backtest(trace, ["last_value"], horizon=20, num_origins=9).origins == [30, 50]
        with pytest.raises(ConfigError, match="--horizon to at most 35"):
            backtest(trace, ["last_value"], horizon=36, num_origins=1)


class TestDetector:
    config = DetectorConfig(window_steps=50)

    def state_of(self, shares, tokens=2048):
        return detect_state(drawn_trace(shares, tokens=tokens, seed=0), self.config)

    def test_a_drift_is_seen_while_it_lasts(self):
        first, last = (random_shares(16, spread=0.5, seed=seed) for seed in (0, 1))
        state = self.state_of(drift(first, last, before=500, during=1000, after=1000))
        at = dict(zip(state.ends.tolist(), state.is_stable[:, 0].tolist(), strict=True))
        assert all(at[end] for end in range(200, 501, 50))
        assert not any(at[end] for end in range(650, 1551, 50))
        assert 1600 <= state.stable_from(0) <= 1700

    def test_equal_shares_are_stable_at_any_batch_size(self):
        tokens = np.where(np.arange(1000) < 500, 256, 4096)
        state = self.state_of(np.tile(random_shares(16, spread=0.5, seed=0), (1000, 1, 1)), tokens)
        assert state.stable_from(0) == 200  # the shift over the first span is not known
        assert state.dispersion[:, 0] == pytest.approx(1.0, abs=0.4)

    def test_shares_that_differ_from_step_to_step_are_dispersed(self):
        shares = np.where(np.arange(1000)[:, None, None] % 2, [0.3, 0.7], [0.7, 0.3])
        state = self.state_of(shares)
        assert (state.dispersion > 100).all() and state.stable_from(0) is None


def every_placement(loads, num_slots, num_devices):
    """All ways to fill the slots that hold every expert."""
    for row in itertools.product(range(len(loads)), repeat=num_slots):
        if set(row) == set(range(len(loads))):
            yield np.array(row)


GOLDEN = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)


class TestPlacement:
    def test_the_published_example(self):
        found = balanced(GOLDEN, num_slots=16, num_devices=8, num_groups=4, num_nodes=2)
        assert found.tolist() == [
            [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
            [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
        ]

    @pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (4, 2), (6, 3), (4, 3)])
    def test_every_expert_has_a_slot_and_groups_stay_on_a_node(self, groups, nodes):
        rng = np.random.default_rng(0)
        for _ in range(20):
            loads = rng.exponential(size=(2, 24))
            found = balanced(loads, num_slots=36, num_devices=6, num_groups=groups, num_nodes=nodes)
            assert found.shape == (2, 36) and all(set(row) == set(range(24)) for row in found.tolist())
            assert device_loads(found, loads, 6).sum(axis=-1) == pytest.approx(loads.sum(axis=-1))
            if groups % nodes == 0:
                for row in found.reshape(2, nodes, -1):
                    groups_of_node = [set((slots // (24 // groups)).tolist()) for slots in row]
                    assert sum(map(len, groups_of_node)) == groups

    @pytest.mark.parametrize(("experts", "slots", "devices"), [(3, 6, 2), (4, 6, 3), (5, 6, 2), (4, 4, 2), (3, 6, 6)])
    def test_the_search_finds_the_best_of_all_placements(self, experts, slots, devices):
        rng = np.random.default_rng(1)
        for _ in range(3):
            loads = rng.exponential(size=experts)
            rows = np.stack(list(every_placement(loads, slots, devices)))
            best = device_loads(rows, np.tile(loads, (len(rows), 1)), devices).max(axis=-1).min()
            found = optimal(loads, num_slots=slots, num_devices=devices)
            assert device_loads(found[None], loads[None], devices).max() == pytest.approx(best)
            greedy = balanced(loads[None], num_slots=slots, num_devices=devices)
            assert device_loads(greedy, loads[None], devices).max() >= best * (1 - 1e-12)

    def test_the_search_takes_larger_cases(self):
        loads = random_shares(8, spread=1.0, seed=3)
        found = optimal(loads[0], num_slots=10, num_devices=5)[None]
        greedy = balanced(loads, num_slots=10, num_devices=5)
        assert 1.0 <= max_over_mean(found, loads, 5) <= max_over_mean(greedy, loads, 5)
        with pytest.raises(ConfigError, match="at most 12 slots"):
            optimal(loads[0], num_slots=16, num_devices=4)

    @pytest.mark.parametrize(("slots", "devices", "groups", "nodes"), [(8, 3, 1, 1), (4, 2, 1, 1), (9, 3, 2, 2)])
    def test_numbers_that_cannot_be_divided_are_refused(self, slots, devices, groups, nodes):
        with pytest.raises(ConfigError, match="cannot"):
            balanced(np.ones((1, 6)), num_slots=slots, num_devices=devices, num_groups=groups, num_nodes=nodes)

    def test_a_layer_without_load_is_placed(self):
        found = balanced(np.zeros((1, 4)), num_slots=8, num_devices=4)
        assert set(found[0].tolist()) == {0, 1, 2, 3} and max_over_mean(found, np.zeros((1, 4)), 4) == 1.0

    def test_forecasts_of_a_steady_load_place_like_the_oracle(self):
        shares = np.tile(random_shares(16, spread=1.0, seed=0), (400, 1, 1))
        trace = drawn_trace(shares, tokens=4096, seed=0)
        tested = backtest(trace, ["window_average", "last_value"], horizon=100, num_origins=2)
        ratios = compare_placements(trace, tested, Devices(4, 24), horizon=100)
        assert ratios[ORACLE] < ratios[STATIC] - 0.1
        assert ratios["window_average"] == pytest.approx(ratios[ORACLE], abs=0.02)
        assert ratios[ORACLE] <= ratios["window_average"] + 0.005

    def test_a_load_that_changes_makes_old_placements_worse_than_none(self):
        first, last = np.array([[6.0, 5.0, 2.0, 1.0]]) / 14, np.array([[6.0, 1.0, 2.0, 5.0]]) / 14
        trace = drawn_trace(drift(first, last, before=200, during=0, after=200), tokens=10_000, seed=0)
        tested = backtest(trace, ["window_average"], horizon=200, num_origins=1)
        ratios = compare_placements(trace, tested, Devices(2, 4), horizon=200)
        assert ratios["window_average"] > ratios[STATIC] > ratios[ORACLE]


class TestPage:
    def write_trace(self, folder, num_steps=90):
        trace = LoadTraceWriter(
            folder, layers=[1, 2], num_experts=8, experts_per_token=1, most_tokens=256, after_step=0
        )
        shares = np.tile(random_shares(8, spread=1.0, seed=0), (num_steps, 2, 1))
        for step, counts in enumerate(drawn_trace(shares, tokens=256, seed=0).counts, start=1):
            trace.write(step, counts)

    def test_a_page_is_complete_in_itself(self, tmp_path, monkeypatch, capsys):
        self.write_trace(tmp_path)
        monkeypatch.setattr(sys, "argv", ["openmimo", "experts", str(tmp_path), "--detector.window-steps", "20"])
        cli.main()
        page = (tmp_path / "experts.html").read_text()
        assert str(tmp_path / "experts.html") in capsys.readouterr().out
        assert page.count("<img") == 4 and 'src="http' not in page and "<link" not in page
        for word in ("window_average", "sampling floor", "oracle", "stable from step 90", "device 3"):
            assert word in page

    def test_numbers_that_do_not_fit_are_said(self, tmp_path):
        self.write_trace(tmp_path, num_steps=20)
        with pytest.raises(ConfigError, match="--horizon to at most 10"):
            write_page(tmp_path, ExpertsConfig(horizon=11))
        with pytest.raises(ConfigError, match="nodes"):
            write_page(tmp_path, ExpertsConfig(devices=4, nodes=3, groups=3))
        with pytest.raises(ConfigError, match="no Predictor called 'moon'"):
            write_page(tmp_path, ExpertsConfig(predictors=("moon",)))
        assert not (tmp_path / "experts.html").exists()
