"""Fully sharded data parallelism with torch FSDP2: a rank keeps a shard of every weight and of its optimizer state.

A layer's weights are gathered before it runs and freed after it. Gradients are summed, not averaged, because losses are
already divided by the number of labels of the whole step.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from openmimo.model.mimo import MiMo


def shard_model(
    model: MiMo,
    weights: DeviceMesh,
    experts: DeviceMesh,
    parallel_experts: Iterable[nn.Module],
    *,
    called: Iterable[nn.Module] | None = None,
) -> None:
    """Shard a model in place. Its weights are whole on every rank, except those that are distributed already.

    Args:
        model: The model.
        weights: Mesh of the plain weights, with dimensions replicate and shard.
        experts: Mesh of expert-parallel weights, with dimensions replicate and shard.
        parallel_experts: Modules of expert-parallel weights.
        called: The modules that are called from outside (None: the model); here the stages of a pipeline.
    """
    for module in parallel_experts:
        _shard(module, experts)
    for layer in (*model.model.layers, *model.model.mtp.layers):
        _shard(layer, weights)
    if model.config.tie_embeddings:
        _shard(model, weights, frees_after_forward=False)
        _share_with_head(model)
        return
    ends = [part for name, part in model.named_modules() if name in ("model.embed_tokens", "lm_head")]
    for module in (*ends, *(called or [model])):
        _shard(module, weights)


def _share_with_head(model: MiMo) -> None:
    """Let the head read the embedding's weight, which belongs to the whole model because two modules have it.

    It stays gathered from the forward to the backward pass. Without gradients it is freed after each call of the head.
    """
    root = cast(FSDPModule, model)

    def gather(*unused: Any) -> None:
        root.unshard()

    def free(*unused: Any) -> None:
        if not torch.is_grad_enabled():
            root.reshard()

    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(free)


def _shard(module: nn.Module, mesh: DeviceMesh, *, frees_after_forward: bool = True) -> None:
    replicated = mesh["replicate"].size() > 1
    fully_shard(
        module,
        mesh=mesh["replicate", "shard"] if replicated else mesh["shard"],
        reshard_after_forward=frees_after_forward,
        shard_placement_fn=_place,
    )
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums


def _place(parameter: nn.Parameter) -> Shard:
    """Return the dimension to shard: the first one, or the second if the first is distributed already."""
    distributed = isinstance(parameter, DTensor) and any(place.is_shard(0) for place in parameter.placements)
    return Shard(1 if distributed else 0)
