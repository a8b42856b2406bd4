"""Differentiable products of FP8 training: linear layers and experts.

Each of the three products of a weight has its own codes:

    output           x, scales along its dims      W, blocks of 128 x 128
    input gradient   g, scales along its dims      W transposed, the same values
    weight gradient  g, scales along the rows      x, scales along the rows

The codes of x along the rows are made in the forward pass and saved, one byte for a number, so that x itself need not
be. The weight is saved as it is (a parameter), and quantized again in the backward pass. A sharded weight is therefore
quantized whenever it has been gathered. Experts save the codes of gate and up, not the product of both, and compute
that again (DeepSeek-V3, arXiv 2412.19437, section 3.3). The weight of an expert multiplies the input of its down
projection, so that its output need not be saved for the gradient of the weight.

R rows, D input dim, O output dim, T tokens, A active experts a token, M = T x A choices, E experts, F expert hidden
dim, P rows sorted by expert.
"""

from typing import Any

import torch

from openmimo.kernels.operations import FLOAT8, Float8Functions, Float8Need, WeightAndBias, count_experts
from openmimo.kernels.weights import FP8_BLOCK, BlockScaled, Float8Latent, Weight


def linear(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.joined_linear` for weights in FP8 training."""
    if len(layers) > 1 and any(weight.shape[0] % FP8_BLOCK for weight, _ in layers):
        return torch.cat([linear(x, (layer,)) for layer in layers], dim=-1)  # blocks do not reach across weights
    weights = tuple(_tensor_of(weight) for weight, _ in layers)
    functions = _functions((x.shape[-1], *(len(weight) for weight in weights)), 1, x)
    out = _Linear.apply(x.flatten(0, -2), functions, torch.is_grad_enabled(), *weights).unflatten(0, x.shape[:-1])
    if all(bias is None for _, bias in layers):
        return out
    return out + torch.cat([x.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in layers])


def experts(
    x_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    weights_TA: torch.Tensor,
    gate_up_EHD: Float8Latent,
    down_EDF: Float8Latent,
) -> torch.Tensor:
    """Implement `openmimo.kernels.operations.apply_experts` for weights in FP8 training."""
    num_experts, model_dim, expert_dim = down_EDF.shape
    functions = _functions((model_dim, expert_dim), num_experts, x_TD)
    places = sort_choices(expert_ids_TA, num_experts)
    return _Experts.apply(
        x_TD, weights_TA, functions, torch.is_grad_enabled(), places, gate_up_EHD.tensor, down_EDF.tensor
    )


def _functions(dims: tuple[int, ...], num_groups: int, x: torch.Tensor) -> Float8Functions:
    functions: Float8Functions = FLOAT8.choose(Float8Need(dims, num_groups, x.dtype, x.is_cpu))[1].run
    return functions


def _tensor_of(weight: Weight) -> torch.Tensor:
    assert isinstance(weight, Float8Latent), "joined weights have one format"
    return weight.tensor


def sort_choices(expert_ids_TA: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort choices by expert, without waiting for a device. The rows of an expert begin at a multiple of 128.

    Returns:
        The row of each choice, int64 [M]; the token of each row or -1, int64 [P]; the end of each expert's rows, a
        multiple of 128, int32 [E].
    """
    ids_M, device = expert_ids_TA.flatten(), expert_ids_TA.device
    chosen_E = count_experts(ids_M, num_experts)
    room_E = (chosen_E + FP8_BLOCK - 1) // FP8_BLOCK * FP8_BLOCK
    ends_E = room_E.cumsum(0)
    order_M = torch.argsort(ids_M, stable=True)
    added_E = ends_E - room_E - (chosen_E.cumsum(0) - chosen_E)
    row_M = torch.empty_like(ids_M)
    row_M[order_M] = torch.arange(len(ids_M), device=device) + added_E[ids_M[order_M]]
    most_rows = (len(ids_M) // FP8_BLOCK + min(num_experts, len(ids_M))) * FP8_BLOCK
    place_P = torch.full((most_rows,), -1, dtype=torch.int64, device=device)
    place_P[row_M] = torch.arange(len(ids_M), device=device) // expert_ids_TA.shape[1]
    return row_M, place_P, ends_E.to(torch.int32)


class _Saved:
    """Codes that a backward pass reads; their tensors are among the saved ones of a context."""

    def __init__(self, *held: BlockScaled | None):
        self._blocks = [None if codes is None else codes.block for codes in held]

    @staticmethod
    def tensors(*held: BlockScaled | None) -> tuple[torch.Tensor, ...]:
        """Return the tensors to save."""
        return tuple(tensor for codes in held if codes is not None for tensor in (codes.codes, codes.scales))

    def codes(self, tensors: tuple[torch.Tensor, ...]) -> list[BlockScaled | None]:
        """Return the codes, given the saved tensors."""
        parts = iter(tensors)
        return [None if block is None else BlockScaled(next(parts), next(parts), block) for block in self._blocks]


class _Linear(torch.autograd.Function):
    """x [R, D] times weights [O, D], side by side."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: torch.Tensor, functions: Float8Functions, for_backward: bool, *weights: torch.Tensor
    ) -> torch.Tensor:
        is_trained = for_backward and any(ctx.needs_input_grad[3:])
        rows, columns = functions.quantize(x_RD, None, is_trained)
        ctx.functions, ctx.saved = functions, _Saved(columns)
        ctx.save_for_backward(*weights, *_Saved.tensors(columns))
        return functions.multiply(rows, functions.quantize_weight(_latents(weights), False), None, x_RD.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_RO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        functions: Float8Functions = ctx.functions
        num_weights = len(ctx.needs_input_grad) - 3
        saved = ctx.saved_tensors  # once: recomputation fills it at the first access
        weights = saved[:num_weights]
        (inputs,) = ctx.saved.codes(saved[num_weights:])
        rows, columns = functions.quantize(gradient_RO.contiguous(), None, inputs is not None)
        gradient_RD = None
        if ctx.needs_input_grad[0]:
            codes_1DO = functions.quantize_weight(_latents(weights), True)
            gradient_RD = functions.multiply(rows, codes_1DO, None, gradient_RO.dtype)
        gradients: list[torch.Tensor | None] = [None] * num_weights
        if inputs is not None and columns is not None:
            parts = functions.weight_gradient(columns, inputs, None)[0].split([len(weight) for weight in weights])
            gradients = [part.to(weight.dtype) for part, weight in zip(parts, weights, strict=True)]
        return gradient_RD, None, None, *gradients


class _Experts(torch.autograd.Function):
    """The sum of the experts of tokens [T, D], by weights [T, A]."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weights_TA: torch.Tensor,
        functions: Float8Functions,
        for_backward: bool,
        places: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        gate_up_EHD: torch.Tensor,
        down_EDF: torch.Tensor,
    ) -> torch.Tensor:
        row_M, place_P, ends_E = places
        is_trained = for_backward and any(ctx.needs_input_grad[5:])
        rows, columns = functions.quantize(x_TD, place_P, is_trained)
        codes_EHD = functions.quantize_weight((Float8Latent(gate_up_EHD, 2),), False)
        gate_up_PH = functions.multiply(rows, codes_EHD, ends_E, x_TD.dtype)
        weights_P = weights_TA.new_zeros(len(place_P), dtype=torch.float32)
        weights_P[row_M] = weights_TA.flatten().float()
        rows, gate_up = functions.gate(gate_up_PH, weights_P, for_backward)
        del gate_up_PH, codes_EHD
        ctx.functions, ctx.saved = functions, _Saved(columns, gate_up)
        ctx.save_for_backward(weights_TA, weights_P, *places, gate_up_EHD, down_EDF, *_Saved.tensors(columns, gate_up))
        codes_EDF = functions.quantize_weight((Float8Latent(down_EDF, 1),), False)
        return _sum_of_choices(functions.multiply(rows, codes_EDF, ends_E, x_TD.dtype), row_M, weights_TA.shape)

    @staticmethod
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        functions: Float8Functions = ctx.functions
        weights_TA, weights_P, row_M, place_P, ends_E, gate_up_EHD, down_EDF, *held = ctx.saved_tensors
        inputs, gate_up = ctx.saved.codes(tuple(held))
        is_trained = inputs is not None
        rows, columns = functions.quantize(gradient_TD.contiguous(), place_P, is_trained)
        codes_EFD = functions.quantize_weight((Float8Latent(down_EDF, 1),), True)
        gradient_PF = functions.multiply(rows, codes_EFD, ends_E, gradient_TD.dtype)
        hidden, rows, gate_columns, gradient_P = functions.gate_backward(gate_up, weights_P, gradient_PF, is_trained)
        gradient_x = gradient_EHD = gradient_EDF = None
        if inputs is not None:
            assert columns is not None and hidden is not None and gate_columns is not None
            gradient_EDF = functions.weight_gradient(columns, hidden, ends_E).to(down_EDF.dtype)
            gradient_EHD = functions.weight_gradient(gate_columns, inputs, ends_E).to(gate_up_EHD.dtype)
        if ctx.needs_input_grad[0]:
            codes_EDH = functions.quantize_weight((Float8Latent(gate_up_EHD, 2),), True)
            sorted_PD = functions.multiply(rows, codes_EDH, ends_E, gradient_TD.dtype)
            gradient_x = _sum_of_choices(sorted_PD, row_M, weights_TA.shape)
        gradient_TA = gradient_P[row_M].view(weights_TA.shape).to(weights_TA.dtype)
        return gradient_x, gradient_TA, None, None, None, gradient_EHD, gradient_EDF


def _sum_of_choices(sorted_PD: torch.Tensor, row_M: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sum the rows of each token's choices [T, A] in float32, in order: [T, D] in the dtype of the rows."""
    chosen_TAD = sorted_PD.index_select(0, row_M).view(*shape, sorted_PD.shape[1])  # also without tokens
    return chosen_TAD.sum(dim=1, dtype=torch.float32).to(sorted_PD.dtype)


def _latents(weights: tuple[torch.Tensor, ...]) -> tuple[Float8Latent, ...]:
    return tuple(Float8Latent(weight, 1) for weight in weights)
