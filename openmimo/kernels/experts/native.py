"""Few tokens on a CPU: one call per layer, which reads the weights of each chosen expert once (native/experts.c).

A token's output has the same bits in every batch. Sums are float32 from the first product to the weighted sum. In
bfloat16, only the activations between the two products are rounded.
"""

import torch

from openmimo.kernels import native
from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import ExpertsNeed
from openmimo.kernels.weights import PLAIN

MAX_VISITS = 256
_EXPERTS = native.Function("openmimo_experts", "6P7q")  # `experts_call` of native/experts.c
_STATUS_NO_EXPERT = 1


def run(
    x_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    weights_TA: torch.Tensor,
    gate_up_EHD: torch.Tensor,
    down_EDF: torch.Tensor,
    *,
    need: ExpertsNeed,
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.apply_experts`.

    Raises:
        IndexError: An expert id is out of range.
        ValueError: Shapes or dtypes disagree.
        MemoryError: A buffer cannot be allocated.
    """
    E, D, F = down_EDF.shape
    shapes_fit = gate_up_EHD.shape == (E, 2 * F, D) and x_TD.shape[1] == D and expert_ids_TA.shape == weights_TA.shape
    if not shapes_fit or not x_TD.dtype == gate_up_EHD.dtype == down_EDF.dtype:
        raise ValueError(
            f"experts do not fit: x {tuple(x_TD.shape)}, ids {tuple(expert_ids_TA.shape)}, weights "
            f"{tuple(weights_TA.shape)}, gate_up {tuple(gate_up_EHD.shape)}, down {tuple(down_EDF.shape)}; dtypes "
            f"{x_TD.dtype}, {gate_up_EHD.dtype}, {down_EDF.dtype}"
        )
    if expert_ids_TA.dtype != torch.int64 or weights_TA.dtype != torch.float32:
        expert_ids_TA, weights_TA = expert_ids_TA.to(torch.int64), weights_TA.to(torch.float32)
    x_TD, expert_ids_TA, weights_TA = x_TD.contiguous(), expert_ids_TA.contiguous(), weights_TA.contiguous()
    gate_up_EHD, down_EDF = gate_up_EHD.contiguous(), down_EDF.contiguous()
    out_TD = torch.empty_like(x_TD)
    call = _EXPERTS.pack(
        x_TD.data_ptr(),
        expert_ids_TA.data_ptr(),
        weights_TA.data_ptr(),
        gate_up_EHD.data_ptr(),
        down_EDF.data_ptr(),
        out_TD.data_ptr(),
        *(*expert_ids_TA.shape, E, D, F),
        *(torch.get_num_threads(), x_TD.dtype == torch.bfloat16),
    )
    status = _EXPERTS.call(call)
    if status == _STATUS_NO_EXPERT:
        raise IndexError(f"there are {E} experts, but the largest expert id is {int(expert_ids_TA.max())}")
    if status:
        raise MemoryError(f"there is no memory for expert ids of shape {tuple(expert_ids_TA.shape)}")
    return out_TD


def refuse(need: ExpertsNeed) -> str | None:
    """Refuse all but a few tokens of float32 or bfloat16 on a CPU, without gradients."""
    if need.weight_format != PLAIN:
        return f"its weights are plain, not {need.weight_format}"
    if not 1 <= need.num_tokens * need.experts_per_token <= MAX_VISITS:
        return f"it takes 1 to {MAX_VISITS} visits of tokens to experts"
    return native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
