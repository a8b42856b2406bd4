"""Tensor parallelism: the ranks of a group compute different heads and hidden dims of the same tokens.

Inputs and outputs of a layer are whole on every rank. The rows of the input projections and the columns of the output
projection are divided, so that the sum of the ranks' outputs is the output:

    x (whole) -> q, k, v of some heads -> attention -> columns of o_proj -> sum over ranks
    x (whole) -> gate, up of some dims -> product   -> columns of down_proj -> sum over ranks

A layer with fewer key/value heads than ranks keeps its key and value projections whole, and each rank uses one head.
Norms, router and experts are whole on every rank, and computed by each. `parallel.vocabulary` divides embedding and
output head.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from openmimo.core.errors import ConfigError
from openmimo.kernels.operations import joined_linear
from openmimo.model.attention import AttentionConfig
from openmimo.model.config import local_heads
from openmimo.model.layers import Attention, DenseFFN, Linear, as_dtype
from openmimo.model.mimo import MiMo


class DividedLinear(Linear):
    """A linear layer of which this rank computes a part.

    Attributes:
        rows: The outputs that this rank computes, if the weight is whole on every rank.
        bias_rows: The same for the bias.
    """

    rows: slice | None
    bias_rows: slice | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., in] to this rank's outputs, or its part of the inputs to a summand of the outputs."""
        weight = local_rows(self.weight, self.rows)
        bias = None if self.bias is None else as_dtype(local_rows(self.bias, self.bias_rows), x.dtype)
        return joined_linear(x, ((as_dtype(weight, x.dtype), bias),))


class DividedAttention(Attention):
    """The heads of one rank.

    Attributes:
        group: The ranks that have the other heads.
        sinks: This rank's entries of the sink logits.
    """

    group: dist.ProcessGroup
    sinks: slice

    @property
    def spec(self) -> AttentionConfig:
        """Geometry of this rank's heads. Assign that of the whole layer."""
        return self._spec

    @spec.setter
    def spec(self, whole: AttentionConfig) -> None:
        """Keep the part of this rank."""
        self._spec = local_heads(whole, dist.get_world_size(self.group))

    def sink(self) -> torch.Tensor | None:
        """Return the sink logits of this rank's heads."""
        whole = self.attention_sink_bias
        return None if whole is None else local_rows(whole, self.sinks)

    def forward(self, x_TD: torch.Tensor, context: Any) -> torch.Tensor:
        """As `Attention.forward`."""
        return SumOverRanks.apply(super().forward(_CopyToRanks.apply(x_TD, self.group), context), self.group)


class DividedFFN(DenseFFN):
    """The hidden dims of one rank."""

    group: dist.ProcessGroup

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """As `DenseFFN.forward`."""
        return SumOverRanks.apply(super().forward(_CopyToRanks.apply(x_TD, self.group)), self.group)


def divide_layers(model: MiMo, mesh: DeviceMesh) -> None:
    """Replace attention and dense FFNs by the parts of this rank. Raises ConfigError if they are not divisible."""
    check_layers(model, mesh.size())
    for layer in (*model.model.layers, *model.model.mtp.layers):
        _divide_attention(cast(Attention, layer.self_attn), mesh)
        if isinstance(layer.mlp, DenseFFN):
            _divide_ffn(layer.mlp, mesh)


def check_layers(model: MiMo, size: int, trained_as: str | None = None) -> None:
    """Raise ConfigError if the layers of a model cannot be divided.

    Args:
        model: The model.
        size: Number of ranks.
        trained_as: The format whose values products will use, if the layers do not have it yet.
    """
    model.config.local(tp=size)
    for layer in (*model.model.layers, *model.model.mtp.layers):
        parts = (layer.self_attn, layer.mlp)
        if (
            trained_as is not None
            or type(layer.self_attn) is not Attention
            or any(
                type(part) is not Linear or part.trained_as is not None
                for module in parts
                for part in module.modules()
                if isinstance(part, nn.Linear)
            )
        ):
            raise ConfigError(
                "tensor parallelism divides full and sliding layers of plain real weights; this model has others. Set "
                "parallel.tp 1."
            )


def _divide_attention(attention: Attention, mesh: DeviceMesh) -> None:
    whole, rank, size = attention.__dict__.pop("spec"), mesh.get_local_rank(), mesh.size()
    attention.__class__ = DividedAttention
    assert isinstance(attention, DividedAttention)
    attention.group = mesh.get_group()
    attention.spec = whole
    _divide(attention.q_proj, mesh, dim=0)
    for layer, dims in ((attention.k_proj, whole.key_dim), (attention.v_proj, whole.value_dim)):
        if whole.num_kv_heads % size == 0:
            _divide(layer, mesh, dim=0)
        else:
            head = rank * whole.num_kv_heads // size
            _divide(layer, mesh, dim=None, rows=slice(head * dims, (head + 1) * dims))
    _divide(attention.o_proj, mesh, dim=1)
    if attention.attention_sink_bias is not None:
        attention.sinks = _part(whole.num_heads, mesh)
        _replace(attention, "attention_sink_bias", mesh, dim=None)


def _divide_ffn(ffn: DenseFFN, mesh: DeviceMesh) -> None:
    ffn.__class__ = DividedFFN
    assert isinstance(ffn, DividedFFN)
    ffn.group = mesh.get_group()
    for layer, dim in ((ffn.gate_proj, 0), (ffn.up_proj, 0), (ffn.down_proj, 1)):
        _divide(layer, mesh, dim=dim)


def _divide(layer: Linear, mesh: DeviceMesh, *, dim: int | None, rows: slice | None = None) -> None:
    """Keep a rank's part of a layer: of its outputs (dim 0), of its inputs (1), or `rows` of a whole weight (None)."""
    layer.__class__ = DividedLinear
    assert isinstance(layer, DividedLinear)
    layer.rows = layer.bias_rows = rows
    _replace(layer, "weight", mesh, dim=dim)
    if layer.bias is not None:  # only input projections have one, and a vector is kept whole
        layer.bias_rows = rows or _part(len(layer.bias), mesh)
        _replace(layer, "bias", mesh, dim=None)


def _replace(module: nn.Module, name: str, mesh: DeviceMesh, *, dim: int | None) -> None:
    parameter = module.get_parameter(name)
    placement = Replicate() if dim is None else Shard(dim)
    divided = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    setattr(module, name, nn.Parameter(divided, requires_grad=parameter.requires_grad))


def _part(count: int, mesh: DeviceMesh) -> slice:
    """Return this rank's share of `count` entries."""
    share = count // mesh.size()
    return slice(mesh.get_local_rank() * share, (mesh.get_local_rank() + 1) * share)


def local_rows(parameter: torch.Tensor, rows: slice | None) -> torch.Tensor:
    """Return this rank's shard of a parameter, or `rows` of one that is whole on every rank."""
    assert isinstance(parameter, DTensor)
    if rows is None:
        return parameter.to_local()
    return parameter.to_local(grad_placements=[Partial()])[rows]


class _CopyToRanks(torch.autograd.Function):
    """Returns a tensor that all ranks have; its gradient is the sum of those of the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class SumOverRanks(torch.autograd.Function):
    """Returns the sum of the ranks' tensors, whose gradient all ranks have."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None
