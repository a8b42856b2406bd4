"""The expert MLPs of a sparse layer: each token visits its A chosen experts, and their outputs are summed by weight.

Shapes: T tokens, D model dim, E experts, A active experts a token, F expert hidden dim. An expert is a SwiGLU:
down(silu(gate(x)) * up(x)); `gate_up` holds the gate rows first (paper section 2.1).
"""

from typing import NamedTuple

import torch

from openmimo.kernels.dispatch import Dispatcher
from openmimo.kernels.weights import PLAIN, Weight, format_of

DISPATCHER = Dispatcher("openmimo.kernels.experts", "OPENMIMO_EXPERTS")


MIXED = "mixed"


class ExpertsNeed(NamedTuple):
    """The properties of a call by which a backend accepts or refuses it.

    weight_format: the format of both weights (see `kernels.weights`), or "mixed".
    """

    num_tokens: int
    num_experts: int
    experts_per_token: int
    model_dim: int
    expert_dim: int
    dtype: torch.dtype
    needs_gradients: bool
    on_cpu: bool
    weight_format: str = PLAIN


def count_experts(expert_ids_TA: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many choices fell on each expert, int64 [E]. Unlike `torch.bincount`, it does not synchronize with a GPU."""
    ids_M = expert_ids_TA.flatten()
    return ids_M.new_zeros(num_experts).scatter_add_(0, ids_M, torch.ones_like(ids_M))


def apply_experts(
    x_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    weights_TA: torch.Tensor,
    gate_up_EHD: Weight,
    down_EDF: Weight,
) -> torch.Tensor:
    """Weighted sum over each token's experts, [T, D] in the dtype of `x_TD`; the sum runs in float32 (float64 stays).

    `expert_ids_TA` is integer, `weights_TA` float32, `gate_up_EHD` is [E, 2F, D], `down_EDF` is [E, D, F]. Both are
    tensors in the dtype of x, or block-scaled constants. Differentiable in all tensors.
    """
    num_tokens, model_dim = x_TD.shape
    num_experts, _, expert_dim = down_EDF.shape
    weight_format = format_of(gate_up_EHD)
    if format_of(down_EDF) != weight_format:
        weight_format = MIXED
    need = ExpertsNeed(
        num_tokens,
        num_experts,
        expert_ids_TA.shape[1],
        model_dim,
        expert_dim,
        x_TD.dtype,
        torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, weights_TA, gate_up_EHD, down_EDF)),
        x_TD.is_cpu,
        weight_format,
    )
    _, backend = DISPATCHER.choose(need)
    return backend.run(x_TD, expert_ids_TA, weights_TA, gate_up_EHD, down_EDF, need=need)
