"""Few tokens on a CPU with int8 experts: one call per layer, which reads each chosen expert once (native/int8.c).

Sums run in float32. A token's output has the same bits in every batch.
"""

import torch

from openmimo.kernels import native
from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import ExpertsNeed
from openmimo.kernels.weights import INT8, BlockScaled

MAX_VISITS = 256
_INT8_EXPERTS = native.Function("openmimo_int8_experts", "8P6q")  # `int8_experts_call` of native/int8.c
_STATUS_NO_EXPERT = 1


def run(
    x_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    weights_TA: torch.Tensor,
    gate_up_EHD: BlockScaled,
    down_EDF: BlockScaled,
    *,
    need: ExpertsNeed,
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.apply_experts`.

    Raises:
        IndexError: An expert id is out of range.
        ValueError: Shapes disagree.
        MemoryError: A buffer cannot be allocated.
    """
    E, D, F = down_EDF.shape
    if gate_up_EHD.shape != (E, 2 * F, D) or x_TD.shape[1] != D or expert_ids_TA.shape != weights_TA.shape:
        raise ValueError(
            f"experts do not fit: x {tuple(x_TD.shape)}, ids {tuple(expert_ids_TA.shape)}, weights "
            f"{tuple(weights_TA.shape)}, gate_up {tuple(gate_up_EHD.shape)}, down {tuple(down_EDF.shape)}"
        )
    tensors = (
        x_TD.float().contiguous(),
        expert_ids_TA.to(torch.int64).contiguous(),
        weights_TA.to(torch.float32).contiguous(),
        gate_up_EHD.codes.contiguous(),
        down_EDF.codes.contiguous(),
        gate_up_EHD.scales.contiguous(),
        down_EDF.scales.contiguous(),
        torch.empty(x_TD.shape, dtype=torch.float32),
    )
    sizes = (*expert_ids_TA.shape, E, D, F, torch.get_num_threads())
    status = _INT8_EXPERTS.call(_INT8_EXPERTS.pack(*[tensor.data_ptr() for tensor in tensors], *sizes))
    if status == _STATUS_NO_EXPERT:
        raise IndexError(f"there are {E} experts, but the largest expert id is {int(expert_ids_TA.max())}")
    if status:
        raise MemoryError(f"there is no memory for expert ids of shape {tuple(expert_ids_TA.shape)}")
    return tensors[-1].to(x_TD.dtype)


def refuse(need: ExpertsNeed) -> str | None:
    """Refuse all but a few tokens of float32 or bfloat16 on a CPU with int8 weights, without gradients."""
    if need.weight_format != INT8:
        return f"its weights are int8 with a scale for each output, not {need.weight_format}"
    if not 1 <= need.num_tokens * need.experts_per_token <= MAX_VISITS:
        return f"it takes 1 to {MAX_VISITS} visits of tokens to experts"
    return native.refuse(need)


PLUGIN = Backend(priority=90, run=run, refuse=refuse)
