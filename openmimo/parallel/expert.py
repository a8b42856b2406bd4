"""Expert parallelism: each rank holds some experts, and tokens travel to the ranks of the experts that they chose.

The dispatcher sends each choice of a token to the rank of its expert in one all-to-all of uneven sizes, so that no
token is dropped and nothing is padded, and the results back in another. The router keeps the global expert ids.
"""

from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from openmimo.core.errors import ConfigError
from openmimo.kernels.operations import apply_experts
from openmimo.kernels.weights import Float8Latent, Weight
from openmimo.model.mimo import MiMo
from openmimo.model.moe import Experts, MoE
from openmimo.parallel.exchange import all_to_all


class ParallelExperts(Experts):
    """The experts of one rank. Rank r of R holds the r-th of R equal runs of slots, and a slot has one expert.

    Attributes:
        group: The ranks that hold the experts.
        slot_of_expert_E: Slot of each expert, int64 [E] (None: slot e has expert e); `expert_placement` sets it.
    """

    group: dist.ProcessGroup
    slot_of_expert_E: torch.Tensor | None = None

    def forward(self, x_TD: torch.Tensor, ids_TA: torch.Tensor, weights_TA: torch.Tensor) -> torch.Tensor:
        """As `Experts.forward`; all ranks of the group call it together."""
        (T, A), D = ids_TA.shape, x_TD.shape[1]
        gate_up_EHD, down_EDF = self._held("gate_up_proj", x_TD.dtype), self._held("down_proj", x_TD.dtype)
        num_held, num_ranks = gate_up_EHD.shape[0], dist.get_world_size(self.group)
        slots_TA = ids_TA if self.slot_of_expert_E is None else self.slot_of_expert_E[ids_TA]
        order = torch.argsort(slots_TA.flatten(), stable=True)
        sent_RE = torch.bincount(slots_TA.flatten(), minlength=num_ranks * num_held).view(num_ranks, num_held)
        received_RE = torch.empty_like(sent_RE)
        dist.all_to_all_single(received_RE, sent_RE, group=self.group)
        sent_counts, received_counts = torch.stack([sent_RE.sum(1), received_RE.sum(1)]).tolist()
        rows_SD = all_to_all(x_TD.index_select(0, order // A), sent_counts, received_counts, self.group)
        experts_S = torch.arange(num_held, device=x_TD.device).repeat(num_ranks)
        experts_S = torch.repeat_interleave(experts_S, received_RE.flatten(), output_size=sum(received_counts))
        ones_S1 = torch.ones(len(rows_SD), 1, device=x_TD.device)
        results_SD = apply_experts(rows_SD, experts_S[:, None], ones_S1, gate_up_EHD, down_EDF)
        sorted_SD = all_to_all(results_SD, received_counts, sent_counts, self.group)
        chosen_TAD = sorted_SD.index_select(0, torch.argsort(order)).view(T, A, D)
        return (chosen_TAD * weights_TA[..., None].to(x_TD.dtype)).sum(dim=1)

    def _held(self, name: str, dtype: torch.dtype) -> Weight:
        weight = self.weight_as(name, dtype)
        if isinstance(weight, Float8Latent):
            return weight._replace(tensor=_local(weight.tensor))
        assert isinstance(weight, torch.Tensor), "other formats are refused"
        return _local(weight)


def _local(weight: torch.Tensor) -> torch.Tensor:
    assert isinstance(weight, DTensor), "distributed by `distribute_experts`"
    return weight.to_local()


def check_experts(model: MiMo, size: int, trained_as: str | None = None) -> None:
    """Raise ConfigError if the experts of a model cannot be divided.

    Args:
        model: The model.
        size: Number of ranks.
        trained_as: The format whose values products will use, if the experts do not have it yet.
    """
    moe = model.config.moe
    if moe is None:
        raise ConfigError(f"ep is {size}, but the model has no experts; set parallel.ep 1.")
    if moe.num_experts % size:
        raise ConfigError(f"ep is {size}; it must divide the {moe.num_experts} experts of the model.")
    for experts in (cast(MoE, layer.mlp).experts for layer in model.model.layers if layer.is_sparse):
        formats = (None, "fp8")
        if type(experts) is not Experts or experts.trained_as not in formats or trained_as not in formats:
            raise ConfigError("expert parallelism divides experts of plain real weights only; set parallel.ep 1.")


def distribute_experts(model: MiMo, mesh: DeviceMesh) -> list[ParallelExperts]:
    """Replace the experts of every sparse layer by those of this rank. Returns them.

    Raises:
        ConfigError: The ranks cannot hold equal numbers of experts.
    """
    check_experts(model, mesh.size())
    replaced = []
    for layer in model.model.layers:
        if layer.is_sparse:
            experts = cast(MoE, layer.mlp).experts
            experts.__class__ = ParallelExperts
            assert isinstance(experts, ParallelExperts)
            experts.group = mesh.get_group()
            for name in ("gate_up_proj", "down_proj"):
                whole = getattr(experts, name)
                held = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
                setattr(experts, name, nn.Parameter(held, requires_grad=whole.requires_grad))
            replaced.append(experts)
    return replaced
