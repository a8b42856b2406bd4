"""Functions run by several connected processes, forked from the test so that torch is imported already."""

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Set when tests are collected: a process forked from one that has started threads can wait for them forever.
torch.set_num_threads(1)


def run_processes(folder: Path, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Returns the results of `function(*arguments)` in each of `count` processes, by rank."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_run, args=(folder, rank, count, function, arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        process.kill()
    failures = [path.read_text() for path in sorted(folder.glob("failure-*"))]
    assert not failures, failures[0]
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(count)]


def _run(folder: Path, rank: int, count: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=count)
        torch.save(function(*arguments), folder / f"result-{rank}")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"failure-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
