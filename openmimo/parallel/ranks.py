"""The part of one process in a training run on several devices; `train.trainer.Alone` is its counterpart for one.

All processes call the methods together and in the same order.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from openmimo.core.errors import ConfigError
from openmimo.data.tokenizer_files import read_companions
from openmimo.model.config import ModelConfig
from openmimo.model.context import PackedContext, RoutingTape
from openmimo.model.heads import MicroBatch
from openmimo.model.hf import check_fit, open_checkpoint
from openmimo.model.hf_files import Entry
from openmimo.model.mimo import MiMo
from openmimo.parallel.boxes import local_box
from openmimo.parallel.context import ContextSplit, ShardedContext
from openmimo.parallel.expert import check_experts, distribute_experts
from openmimo.parallel.fsdp import shard_model
from openmimo.parallel.gradients import ShardedGradients, local_part
from openmimo.parallel.head_exchange import check_exchange
from openmimo.parallel.local_weights import StoredTensor, Unfilled, fill, initialize, read_folder
from openmimo.parallel.mesh import LONG_TIMEOUT, Mesh, build_mesh, process_group
from openmimo.parallel.pipeline import Pipeline, check_stages, gather_from_stages, order_gathers
from openmimo.parallel.shard_reader import gathered_entries, read_model, sharded_config
from openmimo.parallel.stages import PipelineOptions
from openmimo.parallel.tensor import check_layers, divide_layers
from openmimo.parallel.vocabulary import check_vocabulary, divide_vocabulary

Result = TypeVar("Result")


@contextmanager
def open_ranks(
    device: torch.device,
    sizes: dict[str, int],
    pipeline: dict[str, Any] | None = None,
    *,
    writes_shards: bool = True,
    cp_exchange: str = "auto",
) -> Iterator["Ranks"]:
    """Connect the processes of a run.

    Args:
        device: The device of the config.
        sizes: Dimensions of the mesh, see `build_mesh`.
        pipeline: Fields of `PipelineOptions`, for a mesh with pipeline stages.
        writes_shards: Whether each process writes its part of a checkpoint.
        cp_exchange: What full layers exchange under context parallelism; see `parallel.head_exchange`.

    Raises:
        ConfigError: The sizes do not fit the number of processes.
    """
    with process_group(device) as local_device:
        options = None if pipeline is None else PipelineOptions(**pipeline)
        mesh = build_mesh(local_device.type, **sizes)
        yield Ranks(mesh, local_device, options, writes_shards=writes_shards, cp_exchange=cp_exchange)


class Ranks:
    """One process of a run.

    Args:
        mesh: The processes of the run.
        device: The device of this process.
        pipeline: The division into stages; required if the mesh has pipeline stages.

    Attributes:
        device: The device of this process.
        writes_shards: Whether each process writes its part of a checkpoint.
        gradients: Measures of the gradients.
    """

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device,
        pipeline: PipelineOptions | None = None,
        *,
        writes_shards: bool = True,
        cp_exchange: str = "auto",
    ):
        if mesh.pp.size() > 1 and pipeline is None:
            raise ConfigError("this command cannot divide a model into pipeline stages; set parallel.pp 1.")
        self.writes_shards = writes_shards
        self._cp_exchange = cp_exchange
        self._unfilled: WeakKeyDictionary[MiMo, Unfilled] = WeakKeyDictionary()
        self.mesh = mesh
        self.device = device
        self.gradients = ShardedGradients()
        self._options = pipeline
        self._pipeline: Pipeline | None = None
        self._is_gathering = False  # on the main process, whether the others wait in a gather that it asked for

    @functools.cached_property
    def _patient(self) -> dist.ProcessGroup:
        """All processes, for waits that last as long as the work of the main process."""
        return dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return dist.get_rank() == 0

    @property
    def num_processes(self) -> int:
        """Number of processes of the run."""
        return dist.get_world_size()

    @property
    def row_rank(self) -> int:
        """Index of this process among those that read different rows."""
        return self.mesh.row_rank

    @property
    def num_row_ranks(self) -> int:
        """Number of processes that read different rows."""
        return self.mesh.num_row_ranks

    def rows(self, rows: int) -> int:
        """Return the number of rows of an optimizer step that this process reads. Raises ConfigError."""
        if rows % self.num_row_ranks:
            raise ConfigError(
                f"an optimizer step has {rows} rows, which dp_replicate x dp_shard = {self.num_row_ranks} does not "
                "divide; change global_batch_size (and initial_batch_size), or parallel.*."
            )
        return rows // self.num_row_ranks

    def check(self, config: ModelConfig, *, trained_as: str | None = None) -> None:
        """Raise ConfigError if a model cannot be divided as the run asks for.

        Args:
            config: The model.
            trained_as: The quantization whose values its products use, or fp8 (None: neither).
        """
        check_exchange(config, self._cp_exchange, cp=self.mesh.cp.size(), tp=self.mesh.tp.size())
        if self._options is not None:
            check_stages(config, self._options)
        tp, ep = self.mesh.tp.size(), self.mesh.ep.size()
        if tp == ep == 1:
            return
        model = _on_meta(config)
        if tp > 1:
            check_layers(model, tp, trained_as)
            check_vocabulary(config.vocab_size, tp)
        if ep > 1:
            check_experts(model, ep, trained_as)

    def apply(self, model: MiMo) -> None:
        """Distribute a model in place. Raises ConfigError for a model that does not fit.

        Args:
            model: The model, whole on every process, or a result of `draw` or `load`. What its layers keep of their
                activations is set already.
        """
        check_exchange(model.config, self._cp_exchange, cp=self.mesh.cp.size(), tp=self.mesh.tp.size())
        if self.mesh.pp.size() > 1:
            assert self._options is not None
            self._pipeline = Pipeline(model, self.mesh.pp.get_group(), self._options, self.device)
        if self.mesh.tp.size() > 1:
            divide_layers(model, self.mesh.weights["tp"])
            divide_vocabulary(model, self.mesh.weights["tp"])
        experts = distribute_experts(model, self.mesh.ep) if self.mesh.ep.size() > 1 else []
        stages = None if self._pipeline is None else self._pipeline.stages.values()
        shard_model(model, self.mesh.weights, self.mesh.experts, experts, called=stages)
        if self._pipeline is not None:
            for stage in self._pipeline.stages.values():
                order_gathers(stage)
            self.gradients = ShardedGradients(self.mesh.pp.get_group(), self._pipeline.copies())
        if weights := self._unfilled.pop(model, None):
            fill(model, weights, self.device)

    def draw(self, config: ModelConfig, seed: int) -> MiMo:
        """Return a model with the random weights of a seed, on the meta device until `apply` distributes it."""
        return self._later(_on_meta(config), lambda model: initialize(model, seed, _on_meta(config)))

    def load(self, path: str | Path) -> MiMo:
        """Return the model of a folder, on the meta device until `apply` distributes it.

        Args:
            path: A folder in the Hugging Face layout, or a checkpoint in shards.

        Raises:
            CheckpointError: As `model.hf.load_model`, according to the headers of the files.
        """
        folder = Path(path)
        if (folder / "trainer" / "shards").is_dir():
            config, companions = sharded_config(folder)
            model = _on_meta(config)
            model.companions = companions
            return self._later(model, lambda model: read_model(folder, model))
        config, reader = open_checkpoint(folder, None)
        model, described = _on_meta(config), _on_meta(config)
        check_fit(described, reader)
        model.companions = read_companions(folder)
        return self._later(model, lambda model: read_folder(model, reader, described))

    def _later(self, model: MiMo, function: Callable[[MiMo], None]) -> MiMo:
        self._unfilled[model] = Unfilled(model.config.num_mtp_heads, function)
        return model

    def split(
        self,
        batch: MicroBatch,
        *,
        routing: RoutingTape | None,
        balance_weight: float,
        balance_length: int | None,
        z_weight: float = 0.0,
    ) -> tuple[MicroBatch, PackedContext]:
        """Return the part of a micro-batch that this process computes, and its context."""
        if self.mesh.cp.size() == 1:
            return batch, PackedContext(
                batch.document_lengths,
                device=self.device,
                routing=routing,
                balance_weight=balance_weight,
                balance_length=balance_length,
                z_weight=z_weight,
            )
        split = ContextSplit(batch.document_lengths, self.mesh.cp.get_group(), self.device)
        context = ShardedContext(
            split,
            routing=routing,
            balance_weight=balance_weight,
            balance_length=balance_length,
            z_weight=z_weight,
            sum_over_ranks=lambda tensor: self._sum(tensor, ("cp",)),
            exchange=self._cp_exchange,
        )
        return split.batch(batch), context

    def backward(
        self,
        model: MiMo,
        batches: Sequence[MicroBatch],
        *,
        split: Callable[[MicroBatch], tuple[MicroBatch, PackedContext]],
        loss: Callable[[list[torch.Tensor], MicroBatch], tuple[torch.Tensor, torch.Tensor]],
        seen: Callable[[PackedContext], None],
    ) -> torch.Tensor:
        """Accumulate the gradients of all micro-batches of an optimizer step; see `train.trainer.Alone`."""
        if self._pipeline is not None:
            return self._pipeline.backward(batches, split=split, loss=loss, seen=seen)
        losses = torch.zeros(1 + model.config.num_mtp_heads, device=self.device)
        for batch in batches:
            part, context = split(batch)
            total, shares = loss(model.head_states(part, context), part)
            total.backward()
            seen(context)
            losses += shares
        return losses

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes with different tokens."""
        return self._sum(tensor, ("dp_replicate", "dp_shard", "cp"))

    def _sum(self, tensor: torch.Tensor, dimensions: tuple[str, ...]) -> torch.Tensor:
        total = tensor.clone()
        for name in dimensions:
            if self.mesh.whole[name].size() > 1:
                dist.all_reduce(total, group=self.mesh.whole.get_group(name))
        return total

    def sum_over_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the processes that read different rows."""
        return self._sum(tensor, ("dp_replicate", "dp_shard"))

    def sum_over_stages(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the processes that hold different layers."""
        return self._sum(tensor, ("pp",))

    def sum_over_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes."""
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def max_over_all(self, value: int) -> int:
        """Return the maximum of a number over all processes."""
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of a parameter, gradient or buffer that this process holds."""
        return local_part(tensor)

    def like(self, parameter: torch.Tensor, whole: Any) -> torch.Tensor:
        """Return `whole`, a tensor or a StoredTensor of the shape of a parameter, distributed as the parameter is."""
        if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
            return whole.whole() if isinstance(whole, StoredTensor) else whole
        if isinstance(whole, StoredTensor):
            local = whole.read(local_box(parameter)).to(self.device)
            return _distributed(local, parameter)
        whole = whole.to(self.device)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)

    def mesh_of(self, parameter: torch.Tensor) -> object:
        """Return the mesh of a parameter; a fused optimizer takes parameters of one mesh at a time."""
        return parameter.device_mesh if isinstance(parameter, DTensor) else None

    def check_growth(self) -> None:
        """Raise ConfigError, because modules cannot be added to a model that has been distributed."""
        raise ConfigError(
            "mtp_heads rises in the middle of a run, which a run on several devices cannot do; end this run before "
            "that stage, and start the stage as another run with init_from."
        )

    def gathered(self, model: MiMo, optimizer_tensors: dict[str, torch.Tensor]) -> tuple[MiMo, dict[str, torch.Tensor]]:
        """Return a copy of the model and of its optimizer's tensors in CPU memory; on all but the main process empty.

        The tensors are gathered one at a time.
        """
        with torch.device("meta"):
            copy = MiMo(model.config)
        if self.is_main:
            copy = copy.to_empty(device="cpu")
        copy.companions, copy.is_extended = model.companions, model.is_extended
        targets = copy.state_dict()
        for name, whole in self._gathered(model.state_dict()):
            if self.is_main:
                targets[name].copy_(whole)
        tensors = {}
        for name, whole in self._gathered(optimizer_tensors):
            if self.is_main:
                tensors[name] = whole.cpu()
        return copy, tensors

    def _gathered(self, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        if self._pipeline is not None:
            return gather_from_stages(tensors, self.mesh.pp.get_group(), self.device)
        return ((name, _whole(tensor)) for name, tensor in tensors.items())

    def export(self, model: MiMo, function: Callable[[list[Entry] | None], Result]) -> Result:
        """Call a function on the main process only, with the tensors of a model in the Hugging Face layout.

        A tensor is gathered when it is loaded, so that no process holds the whole model.

        Args:
            model: The model, distributed.
            function: Its result (which is pickled) is returned on all processes.
        """
        state = model.state_dict()
        if not self.is_main:
            while (name := self._requested(None)) is not None:
                self._whole_of(state, name)
            return self.on_main(lambda: function(None))

        def whole(name: str) -> torch.Tensor:
            self._requested(name)
            self._is_gathering = True
            tensor = self._whole_of(state, name)
            self._is_gathering = False
            return tensor

        entries = gathered_entries(_on_meta(model.config), whole)

        def run() -> Result:
            try:
                return function(entries)
            finally:
                if not self._is_gathering:
                    self._requested(None)

        return self.on_main(run)

    def _whole_of(self, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        """Return a tensor of the model, whole, on the main process and on those that hold it."""
        if self._pipeline is None:
            return _whole(state[name])
        held = {name: state[name]} if name in state else {}
        gathered = dict(gather_from_stages(held, self.mesh.pp.get_group(), self.device))
        return gathered.get(name, torch.empty(0))

    def _requested(self, name: str | None) -> str | None:
        """Return the `name` of the main process on all processes."""
        box = [name]
        dist.broadcast_object_list(box, src=0, group=self._patient)
        return box[0]

    def main_first(self, function: Callable[[], Result]) -> Result:
        """Call a function on the main process, then on the others. An error of one process ends all of them."""
        result, failure = None, None
        if self.is_main:
            result = self._shared(function)[1]
        else:
            self._shared(None)
            try:
                result = function()
            except Exception as error:  # of any kind: the other processes wait for an answer
                failure = error
        failures = [False] * dist.get_world_size()
        dist.all_gather_object(failures, failure is not None, group=self._patient)
        if failure is not None:
            raise failure
        if any(failures):
            raise SystemExit(1)  # that process prints the error
        return cast(Result, result)

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Call a function on the main process only. Returns its result (which is pickled) on all processes."""
        return self._shared(function if self.is_main else None, share=True)[0]

    def _shared(self, function: Callable[[], Any] | None, *, share: bool = False) -> tuple[Any, Any]:
        """Run a function on the main process and send the outcome to the others. Returns (shared, own) result."""
        result, failure = None, None
        if function is not None:
            try:
                result = function()
            except Exception as error:  # of any kind: the other processes wait for an answer
                if self._is_gathering:
                    raise  # they wait in the gather instead, until the connection ends
                failure = error
        box = [(result if share else None, failure is not None)]
        dist.broadcast_object_list(box, src=0, group=self._patient)
        if failure is not None:
            raise failure
        shared, has_failed = box[0]
        if has_failed:
            raise SystemExit(1)  # the main process prints the error
        return shared, result


def _on_meta(config: ModelConfig) -> MiMo:
    with torch.device("meta"):
        return MiMo(config)


def _distributed(local: torch.Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
