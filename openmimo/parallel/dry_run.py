"""The shards of every rank of a mesh, built on the meta device in one process without communication."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # torch has no public group without communication

from openmimo.model.config import ModelConfig
from openmimo.model.mimo import MiMo
from openmimo.parallel.mesh import build_mesh
from openmimo.parallel.plan import MeshSizes, kept_parameters
from openmimo.parallel.ranks import Ranks


def dry_run(config: ModelConfig, sizes: MeshSizes, *, recompute: bool) -> Iterator[int]:
    """Build the shards of one rank after the other, and check them against the whole. Yields their parameters.

    Args:
        config: The model.
        sizes: The mesh.
        recompute: Whether layers recompute their activations.

    Raises:
        AssertionError: The shards of a weight do not add up to it, or a rank has another number of them than planned.
    """
    with torch.device("meta"):
        whole = {name: parameter.numel() for name, parameter in MiMo(config).named_parameters()}
    num_ranks = sizes.row_ranks * sizes.cp * sizes.tp
    held: Counter[str] = Counter()
    for rank in range(num_ranks):
        parts = _parts(config, sizes, rank, num_ranks, recompute)
        held.update({name: count for name, (count, _) in parts.items()})
        copies = {name: num_copies for name, (_, num_copies) in parts.items()}
        yield sum(count for count, _ in parts.values())
    for name, count in whole.items():
        assert held[name] == count * copies[name], f"the shards of {name} have {held[name]} entries in total"
    planned = kept_parameters(config, sizes) * num_ranks
    assert abs(sum(held.values()) - planned) < 1e-6 * planned, "the plan counts other parameters"


def _parts(
    config: ModelConfig, sizes: MeshSizes, rank: int, num_ranks: int, recompute: bool
) -> dict[str, tuple[int, int]]:
    """Return the entries of each parameter that a rank holds, and on how many ranks each entry is."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        with torch.device("meta"):
            model = MiMo(config)
        ranks = Ranks(build_mesh("cpu", **asdict(sizes)), torch.device("meta"))
        ranks.apply(model, recompute=recompute)
        parts = {}
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            shards = 1
            for dim, placement in enumerate(parameter.placements):
                shards *= parameter.device_mesh.size(dim) if placement.is_shard() else 1
            parts[name] = (parameter.to_local().numel(), num_ranks // shards)
        return parts
    finally:
        dist.destroy_process_group()
