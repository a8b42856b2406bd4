"""The benchmark of two cards runs at toy sizes, and a measurement that fails or hangs is a remark."""

import argparse
import random
import subprocess
import sys
import time

import pytest

from benchmarks import bench_parallel as bench


def test_exposed_communication_is_the_time_without_other_kernels():
    """Against a count of ticks."""
    draw = random.Random(0)
    for _ in range(50):
        sent, computed = (
            [(start, start + draw.randrange(1, 9)) for start in (draw.randrange(40) for _ in range(4))]
            for _ in range(2)
        )
        ticks = [
            tick
            for tick in range(60)
            if any(start <= tick < stop for start, stop in sent)
            and not any(start <= tick < stop for start, stop in computed)
        ]
        assert bench.exposed(sent, computed) == len(ticks)


def started(code: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)


def test_processes_that_fail_or_hang_are_ended():
    hangs = "import time; time.sleep(60)"
    for codes, seconds, reason in (
        ((hangs, "raise SystemExit(3)"), 30, "a process failed"),
        ((hangs, hangs), 0.2, "longer than its limit"),
        (("", ""), 30, ""),
    ):
        processes = [started(code) for code in codes]
        begin = time.monotonic()
        assert bench._wait(processes, seconds).startswith(reason)
        assert all(process.poll() is not None for process in processes) and time.monotonic() - begin < 30
        if not reason:
            assert bench._wait(processes, seconds) == ""


def test_a_row_without_figures_is_a_remark(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "launch", lambda name, cards, options, folder: ({}, "a process failed: Error: full"))
    row, remarks = bench.measure("fsdp", argparse.Namespace(dry=True), tmp_path)
    assert row is None and remarks == [f"fsdp on {cards}: a process failed: Error: full" for cards in (1, 2)]


@pytest.mark.slow
@pytest.mark.long
def test_rows_run_dry(capsys):
    assert bench.main(["--dry", "--rows", "fsdp", "tp", "--seconds", "200"]) == 0
    out = capsys.readouterr().out
    assert "exposed communication" in out and "plan: " in out and "decoding step, tp 2" in out
