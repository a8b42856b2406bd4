"""The processes of a run as a mesh, and the start and end of their communication.

A run on several devices is started by `torchrun`, or by any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT. The dimensions of the mesh, outermost first:

    pp              processes that hold other layers (stages) and read the same rows
    dp_replicate    processes that hold the same shards and read other rows
    dp_shard        processes that hold other shards and read other rows
    cp              processes that hold other shards and read other tokens of the same rows
    tp              processes that compute parts of the same layers on the same tokens

Weights are sharded over dp_shard x cp. The expert-parallel ranks are `ep` neighbors of that product; each holds other
experts, whose weights are sharded over the rest of the product.
"""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from openmimo.core.errors import ConfigError, UserError
from openmimo.runtime.device import process_device

_TIMEOUT = datetime.timedelta(minutes=10)
_MAIN_ERROR = "main"
_SAME_ERROR_TIMEOUT = datetime.timedelta(seconds=5)  # for the main process to raise what another one has raised
# For waits that last as long as the work of another process. One that has ended closes its connections, which ends the
# wait at once.
LONG_TIMEOUT = datetime.timedelta(days=7)


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Connect the processes of the run. Yields the device of this process; the connection ends with the block.

    Raises:
        UserError: Another process has ended or does not answer, or all processes have raised this error.
    """
    local_device = process_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    backend = "gloo" if local_device.type == "cpu" else "nccl"
    store, rank, world_size = next(rendezvous("env://", timeout=_TIMEOUT))
    dist.init_process_group(
        backend,
        timeout=_TIMEOUT,
        store=dist.PrefixStore("run", store),
        rank=rank,
        world_size=world_size,
        device_id=local_device if backend == "nccl" else None,
    )
    try:
        yield local_device
    except UserError as error:
        if _main_prints(error, dist.PrefixStore("errors", store), rank):
            raise SystemExit(1) from error
        raise
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise UserError(
            f"{_reason(error)}, so process {dist.get_rank()} ends; torchrun prints which process failed first. The "
            "same command continues from the newest checkpoint."
        ) from error
    finally:
        dist.destroy_process_group()


def _main_prints(error: UserError, store: dist.Store, rank: int) -> bool:
    """Whether the main process raises the same error as this one, which is another."""
    if rank == 0:
        store.set(_MAIN_ERROR, str(error))
        return False
    try:
        store.wait([_MAIN_ERROR], _SAME_ERROR_TIMEOUT)
        return store.get(_MAIN_ERROR).decode() == str(error)
    except dist.DistError:  # it raises none, or it has ended
        return False


def _reason(error: BaseException | None) -> str:
    """Return why a collective has failed: a timeout does not show that another process has ended."""
    while error is not None:
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            return f"no answer of another process of the run came within {_TIMEOUT}; it is slow, or it waits itself"
        error = error.__cause__
    return "another process of the run has ended"


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error comes from a collective; gloo raises a plain RuntimeError."""
    cause = error.__cause__  # a pipeline schedule raises a RuntimeError of its own
    if isinstance(cause, RuntimeError) and _is_lost_connection(cause):
        return True
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


@dataclass(frozen=True)
class Mesh:
    """The meshes of a run. All of them have the same processes.

    Attributes:
        whole: Dimensions pp, dp_replicate, dp_shard, cp, tp.
        weights: Dimensions replicate and shard, over which plain weights are kept; shard is dp_shard x cp.
        experts: Dimensions replicate, shard and ep, over which experts are kept; shard x ep is dp_shard x cp.
    """

    whole: DeviceMesh
    weights: DeviceMesh
    experts: DeviceMesh

    @property
    def pp(self) -> DeviceMesh:
        """The processes that have the other layers for the same rows."""
        return self.whole["pp"]

    @property
    def cp(self) -> DeviceMesh:
        """The processes that share the rows of this one."""
        return self.whole["cp"]

    @property
    def tp(self) -> DeviceMesh:
        """The processes that share the tokens of this one."""
        return self.whole["tp"]

    @property
    def ep(self) -> DeviceMesh:
        """The processes that hold the other experts."""
        return self.experts["ep"]

    @property
    def row_rank(self) -> int:
        """Index of this process among those that read different rows."""
        replica, shard = self.whole.get_local_rank("dp_replicate"), self.whole.get_local_rank("dp_shard")
        return replica * self.whole["dp_shard"].size() + shard

    @property
    def num_row_ranks(self) -> int:
        """Number of processes that read different rows."""
        return self.whole["dp_replicate"].size() * self.whole["dp_shard"].size()


def build_mesh(device_type: str, *, dp_replicate: int, dp_shard: int, cp: int, tp: int, ep: int, pp: int = 1) -> Mesh:
    """Arrange the processes of the run.

    Args:
        device_type: Type of the devices.
        dp_replicate: Processes with the same shards.
        dp_shard: Processes with other shards and rows (-1: as many as are left).
        cp: Processes that share rows.
        tp: Processes that share layers.
        ep: Processes that hold different experts.
        pp: Processes that hold different layers.

    Raises:
        ConfigError: The product is not the number of processes, or ep does not divide dp_shard x cp.
    """
    processes = dist.get_world_size()
    if dp_shard == -1:
        dp_shard = max(processes // (pp * dp_replicate * cp * tp), 1)
    product = pp * dp_replicate * dp_shard * cp * tp
    if product != processes:
        raise ConfigError(
            f"pp {pp} x dp_replicate {dp_replicate} x dp_shard {dp_shard} x cp {cp} x tp {tp} are {product} processes, "
            f"but {processes} were started; change parallel.*, or start torchrun with --nproc-per-node {product}."
        )
    if dp_shard * cp % ep:
        raise ConfigError(f"ep is {ep}; it must divide dp_shard x cp, which is {dp_shard * cp}.")
    whole = init_device_mesh(
        device_type,
        (pp, dp_replicate, dp_shard, cp, tp),
        mesh_dim_names=("pp", "dp_replicate", "dp_shard", "cp", "tp"),
    )
    weights = init_device_mesh(
        device_type, (pp, dp_replicate, dp_shard * cp, tp), mesh_dim_names=("pp", "replicate", "shard", "tp")
    )
    experts = init_device_mesh(
        device_type,
        (pp, dp_replicate, dp_shard * cp // ep, ep, tp),
        mesh_dim_names=("pp", "replicate", "shard", "ep", "tp"),
    )
    return Mesh(whole, weights, experts)
