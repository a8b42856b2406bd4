"""The processes of a run wait for each other, end together, and refuse what the mesh does not divide."""

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_config
from distributed.processes import run_processes
from torch.testing._internal.distributed.fake_pg import FakeStore

from openmimo.core.errors import ConfigError, UserError
from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.model.mimo import MiMo
from openmimo.model.presets import model_config
from openmimo.parallel import mesh
from openmimo.parallel.ranks import Ranks, open_ranks
from openmimo.train.config import ParallelConfig, Phase, PretrainConfig
from openmimo.train.pretrain import open_ranks as open_run
from openmimo.train.trainer import Alone, Trainer

CPU = torch.device("cpu")
SIZES = {"dp_replicate": 1, "dp_shard": -1, "cp": 1, "tp": 1, "ep": 1, "pp": 1}


@contextlib.contextmanager
def run_of_two(port: int) -> Iterator[Ranks]:
    """A run as `torchrun` starts it, in the place of the processes of the test. A collective may take three seconds."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    mesh._TIMEOUT = datetime.timedelta(seconds=3)
    try:
        with open_ranks(CPU, SIZES) as ranks:
            yield ranks
    finally:  # `run_processes` ends a group
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def long_work(port: int) -> tuple[int, bool]:
    with run_of_two(port) as ranks:
        shared = ranks.on_main(lambda: time.sleep(4) or 5)
        return shared, ranks.main_first(lambda: time.sleep(0 if ranks.is_main else 4) or ranks.is_main)


@pytest.mark.slow
def test_processes_wait_for_the_work_of_one(tmp_path):
    assert run_processes(tmp_path, 2, long_work, free_port()) == [(5, True), (5, False)]


def silence(port: int) -> str:
    try:
        with run_of_two(port) as ranks:
            if ranks.is_main:
                time.sleep(6)
            else:
                ranks.sum_over_all(torch.ones(1))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_timeout_is_not_reported_as_an_end(tmp_path):
    _, message = run_processes(tmp_path, 2, silence, free_port())
    assert "no answer of another process of the run came within 0:00:03" in message and "has ended" not in message


def failure_in_a_gather(port: int) -> str:
    try:
        with run_of_two(port) as ranks:
            model = MiMo(tiny_config(num_layers=1))
            ranks.apply(model)
            if ranks.is_main:
                ranks._whole_of = lambda state, name: [][0]  # the other process is in the gather of this tensor
            ranks.export(model, lambda entries: [entry.load() for entry in entries])
    except (UserError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.slow
def test_a_main_process_that_fails_in_a_gather_ends_the_others(tmp_path):
    main, other = run_processes(tmp_path, 2, failure_in_a_gather, free_port())
    assert main.startswith("IndexError")
    assert "another process of the run has ended" in other


@contextlib.contextmanager
def mesh_of(processes: int, sizes: dict[str, int]) -> Iterator[Ranks]:
    """One process of a mesh, without the others."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield Ranks(mesh.build_mesh("cpu", **SIZES | sizes), CPU)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("processes", "sizes", "config", "trained_as", "message"),
    [
        (3, {"tp": 3}, tiny_config(), None, "tensor-parallel ranks"),
        (2, {"tp": 2}, model_config("tiny_fairy"), None, "complex-valued"),
        (2, {"tp": 2}, tiny_config(), "fp8", "plain real weights"),
        (2, {"tp": 2}, replace(tiny_config(num_layers=1), vocab_size=1), None, "leave ranks without one"),
        (3, {"ep": 3}, tiny_config(), None, "ep is 3; it must divide the"),
        (2, {"ep": 2}, tiny_config(), "binary", "plain real weights"),
    ],
)
def test_a_model_is_refused_by_its_config(processes, sizes, config, trained_as, message):
    with mesh_of(processes, sizes) as ranks:
        if processes == 2:
            ranks.check(tiny_config())
        with pytest.raises(ConfigError, match=message):
            ranks.check(config, trained_as=trained_as)


class FourProcesses(Alone):
    """The part of one process, with the numbers of four."""

    num_processes = 4

    def max_over_all(self, value: int) -> int:
        return 4 * value


def test_metrics_of_a_step_are_those_of_all_processes(monkeypatch):
    monkeypatch.setattr("openmimo.train.trainer.peak_memory_bytes", lambda device: 10)
    report = SimpleNamespace(losses=[1.0], gradient_norm=1.0, num_zero_gradients=0, tokens=64, load={})
    trainer = SimpleNamespace(
        model=SimpleNamespace(config=tiny_config()), tokens=64, device=CPU, _matmul_flops=1e9,
        optimizer=SimpleNamespace(param_groups=[{"lr": 0.1}]), guard=SimpleNamespace(num_skipped=0), _placement=None,
    )  # fmt: skip
    rows = []
    for trainer.ranks in (Alone(CPU), FourProcesses(CPU)):
        rows.append(Trainer._step_metrics(trainer, SimpleNamespace(name="x", sequence_length=64), report, 2.0))
    alone, four = rows
    assert alone["matmul_utilization"] == pytest.approx(4 * four["matmul_utilization"])
    assert (alone["memory_bytes"], four["memory_bytes"]) == (10, 40)


def test_whole_checkpoints_are_refused_in_one_process(tmp_path):
    parallel = ParallelConfig(checkpoints="whole")
    stage = Phase(
        name="x", steps=1, sequence_length=64, global_batch_size=1, learning_rate=1e-3, end_learning_rate=1e-3,
        mixture=MixtureConfig((SourceConfig("repeats"),)),
    )  # fmt: skip
    config = PretrainConfig(str(tmp_path), stages=(stage,), parallel=parallel, device="cpu")
    with pytest.raises(ConfigError, match=r"parallel.checkpoints whole has no effect"), open_run(config):
        pass
