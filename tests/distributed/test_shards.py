"""Checkpoints in shards: written by any mesh, read by any other, valid only when complete, never silently lost."""

import os
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import randomize, tiny_config
from distributed.processes import run_processes
from distributed.test_equals_one_process import CPU, WHOLE, whole

from openmimo.core.errors import CheckpointError
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.backbone import checkpoint_activations
from openmimo.model.convert import ConvertConfig, convert
from openmimo.model.hf import load_model, save_model, write_model
from openmimo.model.hf_files import Entry
from openmimo.model.mimo import MiMo
from openmimo.parallel import shards
from openmimo.parallel.mesh import build_mesh
from openmimo.parallel.ranks import Ranks
from openmimo.parallel.shard_reader import open_shards
from openmimo.train.checkpoint import (
    Checkpoints,
    Progress,
    find_damage,
    load_optimizer_state,
    optimizer_state,
    restore,
    write_manifest,
)
from openmimo.train.config import CheckpointConfig, OptimizerConfig
from openmimo.train.optim import build_optimizer
from openmimo.train.sharded import ShardWriter, restore_local

TEXT = ["shards of a model", "one rank writes what it holds"] * 20


def trained(sizes: dict[str, int], *, tied: bool = False):
    """A model of a mesh after one step, its optimizer, and the part of this process."""
    ranks = Ranks(build_mesh("cpu", **WHOLE | sizes), CPU)
    model = randomize(MiMo(replace(tiny_config(num_layers=2, mtp_heads=1), tie_embeddings=tied)), 0).train()
    ranks.apply(model)
    optimizer = build_optimizer(model, OptimizerConfig(), mesh_of=ranks.mesh_of)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().sin()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.step()
    return model, optimizer, ranks


def state(model, optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()} | optimizer_state(
        model, optimizer
    )
    return {name: whole(tensor).clone() for name, tensor in tensors.items()}


def save_on(folder: Path, sizes: dict[str, int], tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    model, optimizer, ranks = trained(sizes)
    expected = state(model, optimizer)
    writer = ShardWriter(Checkpoints(folder, CheckpointConfig(keep_last=1)), ranks)
    writer.save(model, optimizer_state(model, optimizer), tokenizer, Progress(2, 7, 0, {"row": 2}))
    with torch.no_grad():  # training goes on while files are written
        for parameter in model.parameters():
            ranks.local(parameter).zero_()
    writer.wait()
    return expected


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXT, 300)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("saved")
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)  # an old one, which is not kept
    expected, _ = run_processes(folder, 2, save_on, folder, {"cp": 2, "ep": 2}, tokenizer)
    return folder / "checkpoints" / "step-00000002", expected


def test_one_device_resumes_from_shards(saved):
    path, expected = saved
    assert find_damage(path) is None
    assert [entry.name for entry in path.parent.iterdir()] == ["step-00000002"]
    model, tensors, progress = restore(path, CPU)
    assert progress == Progress(2, 7, 0, {"row": 2})
    restored = {f"model.{name}": tensor for name, tensor in model.state_dict().items()} | tensors
    assert restored.keys() == expected.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in expected.items())


def resumed_on(path: Path, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    ranks = Ranks(build_mesh("cpu", **WHOLE | sizes), CPU)
    model, tensors, progress = restore_local(path, ranks)
    assert progress == Progress(2, 7, 0, {"row": 2})
    checkpoint_activations(model.model)
    ranks.apply(model)
    optimizer = build_optimizer(model, OptimizerConfig(), mesh_of=ranks.mesh_of)
    load_optimizer_state(model, optimizer, tensors, like=ranks.like)
    return state(model, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"dp_shard": 3}, {"dp_shard": 2, "tp": 2}, {"dp_replicate": 2, "ep": 2}])
def test_other_meshes_resume_from_shards(saved, tmp_path, sizes):
    path, expected = saved
    tensors = run_processes(tmp_path, 3 if sizes == {"dp_shard": 3} else 4, resumed_on, path, sizes)[0]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_shards_are_exported_as_a_model_folder(saved, tmp_path):
    path, expected = saved
    model, *_ = restore(path, CPU)
    save_model(model, tmp_path / "saved")
    convert(path, tmp_path / "converted", ConvertConfig("float32"), start=lambda total: print, open_source=open_shards)
    tokens = torch.arange(50)
    first, second = (load_model(tmp_path / name) for name in ("saved", "converted"))
    assert torch.equal(first.logits(tokens), second.logits(tokens))
    assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in first.state_dict().items())
    with pytest.raises(CheckpointError, match="openmimo convert"):
        load_model(path)


def test_a_damaged_shard_is_found(saved, tmp_path):
    path, _ = saved
    copy = tmp_path / "copy"
    (copy / "trainer" / "shards").mkdir(parents=True)
    for file in path.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(path)).write_bytes(file.read_bytes())
    damaged = copy / "trainer" / "shards" / "__1_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    assert "__1_0.distcp does not match its checksum" in str(find_damage(copy))
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        restore(copy, CPU)
    damaged.unlink()
    assert "is missing" in str(find_damage(copy))
    with pytest.raises(CheckpointError, match="is missing"):
        restore(copy, CPU)


def test_shards_on_the_disk_of_another_machine_are_not_a_checkpoint(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved[0], copy)
    manifest, shard = copy / "trainer" / "manifest.json", "trainer/shards/__1_0.distcp"
    (copy / shard).unlink()
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match="shared file system"):
        write_manifest(copy, {shard: "0" * 64})
    assert not manifest.exists()
    write_manifest(copy)  # as an earlier version did
    assert "__1_0.distcp is missing" in str(find_damage(copy))


class Code:
    def __reduce__(self):
        return os.mkdir, ("code-ran",)


def test_metadata_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / shards.METADATA).write_bytes(pickle.dumps(Code()))
    with pytest.raises(CheckpointError, match="it names posix.mkdir"):
        shards.ShardFolder(tmp_path)
    assert not (tmp_path / "code-ran").exists()


def writer_that_fails(folder: Path, tokenizer: Tokenizer, ends: bool) -> list[str]:
    """Returns the errors of `wait`, and the checkpoints after it, if process 1 fails or is killed while it writes."""
    model, optimizer, ranks = trained({})
    checkpoints, rank = Checkpoints(folder, CheckpointConfig()), dist.get_rank()
    writer = ShardWriter(checkpoints, ranks)
    begun = threading.Event()

    def write_data(*arguments):
        begun.wait()
        if ends:
            torch.save(None, folder / "result-1")
            os._exit(9)
        raise OSError(28, "No space left on device")

    if rank == 1:
        shards.FileSystemWriter.write_data = write_data
    writer.save(model, optimizer_state(model, optimizer), tokenizer, Progress(3, 0, 0, {}))
    assert not writer.has_failed, "the call returns before the file is written"
    begun.set()
    with pytest.raises((CheckpointError, RuntimeError)) as error:
        writer.wait()
    writer.wait()
    if not ends:
        dist.barrier()  # the main process has removed the folder
    return [str(error.value), str(checkpoints.newest()), *(path.name for path in checkpoints.folder.iterdir())]


@pytest.mark.slow
def test_a_failed_writer_is_an_error_of_every_process(tmp_path, tokenizer):
    for message, newest, *left in run_processes(tmp_path, 2, writer_that_fails, tmp_path, tokenizer, False):
        assert (
            "step-00000003 could not be written: [Errno 28] No space left on device. There is no checkpoint" in message
        )
        assert newest == "None" and not left


@pytest.mark.slow
def test_a_killed_writer_leaves_no_checkpoint(tmp_path, tokenizer):
    (_, newest, *_), _ = run_processes(tmp_path, 2, writer_that_fails, tmp_path, tokenizer, True)
    assert newest == "None"
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.recover()
    assert not list(checkpoints.folder.iterdir())


def save_tied(folder: Path, tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    model, optimizer, ranks = trained({"tp": 2}, tied=True)
    writer = ShardWriter(Checkpoints(folder, CheckpointConfig()), ranks)
    writer.save(model, optimizer_state(model, optimizer), tokenizer, Progress(2, 7, 0, {"row": 2}))
    writer.wait()

    def write(entries: list[Entry] | None) -> None:
        (folder / "exported").mkdir()
        write_model(model, folder / "exported", entries=entries)

    ranks.export(model, write)
    return state(model, optimizer)


@pytest.mark.slow
def test_tied_embeddings_in_shards(tmp_path, tokenizer):
    expected, _ = run_processes(tmp_path, 2, save_tied, tmp_path, tokenizer)
    path = tmp_path / "checkpoints" / "step-00000002"
    model, tensors, _ = restore(path, CPU)
    optimizer = build_optimizer(model, OptimizerConfig())
    load_optimizer_state(model, optimizer, tensors)
    (tmp_path / "other").mkdir()
    for restored in (state(model, optimizer), *run_processes(tmp_path / "other", 2, resumed_on, path, {"ep": 2})):
        assert restored.keys() == expected.keys()
        assert all(torch.equal(restored[name], tensor) for name, tensor in expected.items())
    convert(path, tmp_path / "converted", ConvertConfig("float32"), start=lambda total: id, open_source=open_shards)
    tokens = torch.arange(50)
    for folder in ("converted", "exported"):
        assert torch.equal(load_model(tmp_path / folder).logits(tokens), model.logits(tokens))
