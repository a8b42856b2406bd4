"""Weights that each process fills where it holds them: equal to those of one process, and never whole."""

import weakref
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from distributed.processes import run_processes
from distributed.test_equals_one_process import CPU, WHOLE, whole
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openmimo.data.tokenizer import Tokenizer
from openmimo.model.convert import ConvertConfig, convert
from openmimo.model.hf import load_model, save_model
from openmimo.model.hf_files import CheckpointReader
from openmimo.model.mimo import MiMo
from openmimo.parallel import local_weights
from openmimo.parallel.mesh import build_mesh
from openmimo.parallel.ranks import Ranks
from openmimo.train.checkpoint import Checkpoints, Progress, load_optimizer_state, optimizer_state
from openmimo.train.config import CheckpointConfig, OptimizerConfig
from openmimo.train.optim import build_optimizer
from openmimo.train.sharded import restore_local

CONFIG = tiny_config(num_layers=2, mtp_heads=1)
MESHES = [{}, {"tp": 2}, {"ep": 2}]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that exist, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if type(result) in (torch.Tensor, torch.nn.Parameter) and result.device.type == "cpu":
                self._count(result.untyped_storage())
        return results

    def _count(self, storage):
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key, num_bytes):
        self._seen.discard(key)
        self.now -= num_bytes


def reference() -> MiMo:
    model = MiMo(CONFIG)
    model.initialize(torch.Generator().manual_seed(3))
    model.replicate_mtp_heads(3)
    return model


def weights_of(model: MiMo) -> dict[str, torch.Tensor]:
    return {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}


def held_bytes(model: MiMo, ranks: Ranks) -> int:
    return sum(ranks.local(tensor).nbytes for tensor in model.state_dict().values())


def drawn_on_meshes(meshes: list[dict[str, int]]) -> list[tuple[dict[str, torch.Tensor], int, int]]:
    local_weights.MAX_DRAWN_BYTES = 4096
    outcomes = []
    for sizes in meshes:
        ranks = Ranks(build_mesh("cpu", **WHOLE | sizes), CPU)
        model = ranks.draw(CONFIG, 3)
        model.replicate_mtp_heads(3)
        live = LiveBytes()
        with live:
            ranks.apply(model)
        outcomes.append((weights_of(model), live.peak, held_bytes(model, ranks)))
    return outcomes


@pytest.mark.parametrize("meshes", [MESHES[1:2], pytest.param([MESHES[0], MESHES[2]], marks=pytest.mark.slow)])
def test_random_weights_have_the_bits_of_one_process(tmp_path, meshes):
    expected = weights_of(reference())
    largest = max(tensor.nbytes for tensor in expected.values())
    for (weights, peak, held), sizes in zip(
        run_processes(tmp_path, 2, drawn_on_meshes, meshes)[0], meshes, strict=True
    ):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items()), sizes
        assert held <= peak < held + largest / 2, sizes


@pytest.mark.parametrize("shape", [(1,), (15,), (17,), (5, 3), (33, 7), (4, 16), (100, 24), (6, 5, 8), (40, 1)])
def test_slabs_have_the_bits_of_one_draw(shape, monkeypatch):
    monkeypatch.setattr(local_weights, "MAX_DRAWN_BYTES", 256)
    slabs, expected = torch.empty(shape), torch.empty(shape)
    local_weights.draw(slabs, slabs, 0.3, torch.Generator().manual_seed(5))
    assert torch.equal(slabs, expected.normal_(std=0.3, generator=torch.Generator().manual_seed(5)))


def loaded_on_meshes(folders: list[Path]) -> list[tuple[dict[str, torch.Tensor], int]]:
    outcomes = []
    for folder, sizes in zip(folders, MESHES, strict=True):
        ranks = Ranks(build_mesh("cpu", **WHOLE | sizes), CPU)
        model = ranks.load(folder)
        model.replicate_mtp_heads(3)
        read, inner = [], CheckpointReader._tensor

        def counted(self, *arguments, read=read, inner=inner):
            tensor = inner(self, *arguments)
            read.append(tensor.numel())
            return tensor

        CheckpointReader._tensor = counted
        ranks.apply(model)
        CheckpointReader._tensor = inner
        outcomes.append((weights_of(model), sum(read)))
    return outcomes


@pytest.mark.slow
def test_a_folder_is_read_in_slices(tmp_path):
    """Plain tensors are read where they are held; quantized and fused ones as a whole."""
    model = reference()
    model.config = CONFIG
    model.model.mtp.layers = model.model.mtp.layers[:1]
    save_model(model, tmp_path / "plain")
    kinds = {"plain": None, "half": ConvertConfig("bfloat16"), "fp8": ConvertConfig("fp8", "fused_qkv")}
    for name, kind in kinds.items():
        if kind is not None:
            convert(tmp_path / "plain", tmp_path / name, kind, start=lambda total: lambda part: None)
    outcomes = run_processes(tmp_path, 2, loaded_on_meshes, [tmp_path / name for name in kinds])[0]
    for name, (weights, read) in zip(kinds, outcomes, strict=True):
        other = load_model(tmp_path / name)
        other.replicate_mtp_heads(3)
        assert all(torch.equal(weights[key], tensor) for key, tensor in weights_of(other).items()), name
        if name == "plain":
            assert read < 0.51 * sum(tensor.numel() for tensor in weights_of(load_model(tmp_path / name)).values())


def trained_alone() -> tuple[MiMo, torch.optim.Optimizer]:
    model = reference()
    optimizer = build_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    return model, optimizer


def restored(path: Path) -> tuple[dict[str, torch.Tensor], Progress]:
    ranks = Ranks(build_mesh("cpu", **WHOLE | {"tp": 2}), CPU)
    model, tensors, progress = restore_local(path, ranks)
    ranks.apply(model)
    optimizer = build_optimizer(model, OptimizerConfig(), mesh_of=ranks.mesh_of)
    load_optimizer_state(model, optimizer, tensors, like=ranks.like)
    moments = {name: whole(tensor) for name, tensor in optimizer_state(model, optimizer).items()}
    return weights_of(model) | moments, progress


@pytest.mark.slow
def test_a_checkpoint_of_one_device_resumes_on_several(tmp_path):
    model, optimizer = trained_alone()
    expected = weights_of(model) | optimizer_state(model, optimizer)
    tokenizer = Tokenizer.train(["one text of many letters"] * 20, 300)
    progress = Progress(5, 9, 0, {"row": 4})
    path = Checkpoints(tmp_path, CheckpointConfig()).save(model, optimizer_state(model, optimizer), tokenizer, progress)
    tensors, read = run_processes(tmp_path, 2, restored, path)[0]
    assert read == progress and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
