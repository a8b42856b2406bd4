"""The shards of every rank of a mesh, built on the meta device in one process without communication."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # torch has no public group without communication

from openmimo.model.backbone import checkpoint_activations
from openmimo.model.config import ModelConfig
from openmimo.model.mimo import MiMo
from openmimo.parallel.mesh import build_mesh
from openmimo.parallel.plan import MeshSizes, kept_parameters
from openmimo.parallel.ranks import Ranks
from openmimo.parallel.stages import PipelineOptions


def dry_run(config: ModelConfig, sizes: MeshSizes, *, recompute: bool, sequence_length: int = 1) -> Iterator[int]:
    """Build the shards of one rank after the other, and check them against the whole. Yields their parameters.

    Args:
        config: The model.
        sizes: The mesh.
        recompute: Whether layers recompute their activations.
        sequence_length: Tokens of a row, for which the pipeline stages are divided.

    Raises:
        AssertionError: The shards of a weight do not add up to it, or a rank has another number of them than planned.
    """
    with torch.device("meta"):
        whole = {name: parameter.numel() for name, parameter in MiMo(config).named_parameters()}
    stages = PipelineOptions(
        "1f1b" if sizes.stages_per_rank == 1 else "interleaved", sizes.num_stages, (), sequence_length
    )
    held: Counter[str] = Counter()
    wholes: dict[str, Fraction] = {}  # the shares that ranks should have of a parameter
    for rank in range(sizes.ranks):
        parts = _parts(config, sizes, rank, stages, recompute)
        held.update({name: count for name, (count, _) in parts.items()})
        for name, (_, num_shards) in parts.items():
            wholes[name] = wholes.get(name, Fraction(0)) + Fraction(1, num_shards)
        yield sum(count for count, _ in parts.values())
    for name, count in whole.items():
        assert wholes[name] >= 1 and held[name] == count * wholes[name], f"{name} has {held[name]} entries in total"
    planned = kept_parameters(config, sizes, sequence_length) * sizes.ranks
    assert abs(sum(held.values()) - planned) < 1e-6 * planned, "the plan counts other parameters"


def _parts(
    config: ModelConfig, sizes: MeshSizes, rank: int, stages: PipelineOptions, recompute: bool
) -> dict[str, tuple[int, int]]:
    """Return the entries of each parameter that a rank holds, and the number of shards of the parameter."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=sizes.ranks)
    try:
        with torch.device("meta"):
            model = MiMo(config)
        dimensions = {name: size for name, size in asdict(sizes).items() if name != "stages_per_rank"}
        ranks = Ranks(build_mesh("cpu", **dimensions), torch.device("meta"), stages)
        if recompute:
            checkpoint_activations(model.model)
        ranks.apply(model)
        parts = {}
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            shards = 1
            for dim, placement in enumerate(parameter.placements):
                shards *= parameter.device_mesh.size(dim) if placement.is_shard() else 1
            parts[name] = (parameter.to_local().numel(), shards)
        return parts
    finally:
        dist.destroy_process_group()
