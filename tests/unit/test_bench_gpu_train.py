"""The benchmark of training on a GPU runs at toy sizes, and a row that fails does not lose the others."""

import json
import time

import pytest
import torch

from benchmarks import bench_gpu_train as bench
from benchmarks.harness import Row


def test_kernels_run_dry(capsys):
    assert bench.main(["--dry", "--rows", "packs", "experts", "--backends", "experts:reference"]) == 0
    out = capsys.readouterr().out
    assert "reference; " in out and "sorted_loop; " in out and "unequal pack backward" in out


@pytest.mark.slow
def test_every_row_runs_dry(capsys):
    assert bench.main(["--dry"]) == 0
    out = capsys.readouterr().out
    assert "prefill 24" in out and "longest row" in out and "layers recomputed, 16 chunks, offload" in out


@pytest.mark.slow
def test_a_row_that_fails_or_takes_too_long_is_a_remark(monkeypatch, capsys):
    def fails(own):
        yield Row("half", 1.0)
        raise ValueError("first line\nsecond line")

    def hangs(own):
        assert own.peer(lambda: time.sleep(30)) == (
            None,
            "; the peer failed: TooLongError: longer than its limit (2 s for a row)",
        )
        yield Row("before", 1.0)
        time.sleep(30)

    monkeypatch.setattr(bench, "MEASURES", {"fails": fails, "hangs": hangs, "loss": bench.loss})
    results = bench.Results([], [])
    sizes = bench.Bench(torch.device("cpu"), torch.float32, bench.DRY, 1e7, 1e7, {}, has_peers=True, peer_seconds=1)
    lost = [bench._measure(sizes, name, results, 2) for name in ("fails", "hangs", "loss")]
    assert [row.name for row in results.rows] == ["half", "before", "token loss"]
    assert lost == [False] * 3 and results.failures == 2
    assert "ValueError: first line" in results.remarks[0] and "limit (2 s" in results.remarks[1]


def test_a_backend_that_refuses_or_does_not_exist_fails_by_name(capsys):
    assert bench.main(["--dry", "--rows", "full", "--backends", "attention:banded", "--no-peers"]) == 1
    assert "backend 'banded' refuses the call" in capsys.readouterr().err
    assert bench.main(["--dry", "--rows", "full", "--backends", "attention:none", "--no-peers"]) == 1
    assert "there is no backend 'none'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--dry", "--backends", "loss"])


def test_results_go_on_in_a_new_process_after_the_accelerator_is_lost(tmp_path, monkeypatch):
    kept = bench.Results([Row("sliding", 1.0, 2.0, "peer")], ["x: failed after 3 s: AcceleratorError"])
    path = kept.write(torch.device("cpu"), tmp_path)
    again = bench.Results.after(path)
    assert again.rows == kept.rows and again.failures == 1
    assert {"commit", "versions", "machine"} <= json.loads(path.read_text()).keys()

    started = []
    monkeypatch.setattr(bench.subprocess, "run", lambda command, check: (started.append(command), bench)[1])
    monkeypatch.setattr(bench, "returncode", 3, raising=False)
    options = bench.argparse.Namespace(seconds=9, peer_seconds=5, backends=["experts:x"], no_peers=True, out=tmp_path)
    assert bench._go_on(options, ["loss", "train"], path) == 3
    command = " ".join(started[0])
    assert "--rows loss train --after" in command and "--backends experts:x --no-peers" in command
