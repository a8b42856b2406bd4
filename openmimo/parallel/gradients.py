"""Measures of gradients whose parameters are sharded over different meshes."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a parameter, gradient or buffer that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardedGradients:
    """Norm and zeros of sharded gradients. All ranks call its methods together.

    Args:
        stages: The ranks that have the other layers of the model (None: there are none).
        copies: Parameters of this rank that another of these ranks has as well; they count there.
    """

    def __init__(self, stages: dist.ProcessGroup | None = None, copies: Iterable[nn.Parameter] = ()):
        self._stages = stages
        self._copies = {id(parameter) for parameter in copies}

    def local(self, parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
        """Return the parts of the gradients that this rank holds."""
        return [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]

    def norm(self, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
        """Return the norm of all gradients together, a scalar."""
        counted = self._counted(parameters)
        norms = torch._foreach_norm(self.local(counted))
        return self._sum(counted, [norm.float() ** 2 for norm in norms]).sqrt()

    def num_zeros(self, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
        """Return the number of entries of the gradients that are exactly zero, a scalar."""
        counted = self._counted(parameters)
        counts = [part.numel() - torch.count_nonzero(part) for part in self.local(counted)]
        return self._sum(counted, [torch.as_tensor(count, dtype=torch.float64) for count in counts]).long()

    def _counted(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        return [item for item in parameters if item.grad is not None and id(item) not in self._copies]

    def _sum(self, parameters: list[nn.Parameter], values: list[torch.Tensor]) -> torch.Tensor:
        total = _sum_over_shards(parameters, values)
        if self._stages is not None:
            dist.all_reduce(total, group=self._stages)
        return total


def _sum_over_shards(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of one value per parameter and rank; ranks with the same part of a parameter count once."""
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[torch.Tensor]] = {}
    for parameter, value in zip(parameters, values, strict=True):
        gradient = parameter.grad
        groups: tuple[dist.ProcessGroup, ...] = ()
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            groups = tuple(mesh.get_group(dim) for dim, place in enumerate(gradient.placements) if place.is_shard())
        by_groups.setdefault(groups, []).append(value)
    total = torch.zeros((), dtype=values[0].dtype, device=values[0].device)
    for groups, parts in by_groups.items():
        part = torch.stack(parts).sum()
        for group in groups:
            dist.all_reduce(part, group=group)
        total = total + part
    return total
