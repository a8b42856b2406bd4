"""Triton kernels of the token losses: the softmax of a row of logits with its gradient in place, and a scaling.

A program reads its row twice. The first time, each lane keeps the largest logit of its columns and the sum of
exponentials relative to it; these are joined at the end. The second time, the gradient overwrites the row. Logits are
in units of log2. No atomics: results are deterministic.

Not yet run on a GPU: tested in Triton's interpreter, compiled for sm_90a (docs/log.md).

M rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl

ROW_NUMBERS = 4096
SCALE_NUMBERS = 4096
SCALE_PROGRAMS = 1056  # eight for each multiprocessor of a large card


def softmax_rows(
    logits_MV: torch.Tensor,
    labels_M: torch.Tensor,
    temperatures_M: torch.Tensor | None,
    coefficients_M: torch.Tensor | None,
) -> torch.Tensor:
    """Return log p(label), float32 [M], and overwrite the logits with coefficient * (p - onehot(label)).

    Args:
        logits_MV: Logits, with contiguous rows.
        labels_M: Labels; -1 gives 0 and no onehot.
        temperatures_M: Temperature of each row, float32 (None: 1).
        coefficients_M: Coefficient of each row, float32 (None: the logits stay as they are).
    """
    M, V = logits_MV.shape
    logprobs_M = torch.empty(M, dtype=torch.float32, device=logits_MV.device)
    _softmax_row[(M,)](
        logits_MV, labels_M, temperatures_M, coefficients_M, logprobs_M, V, logits_MV.stride(0),
        BLOCK=min(ROW_NUMBERS, triton.next_power_of_2(V)),
        HAS_TEMPERATURE=temperatures_M is not None, WRITES=coefficients_M is not None, num_warps=8,
    )  # fmt: skip
    return logprobs_M


def scale_in_place(tensor: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply a contiguous tensor by a scalar on its device. A factor of 1 costs no memory traffic."""
    if tensor.numel():
        _scale[(min(SCALE_PROGRAMS, triton.cdiv(tensor.numel(), SCALE_NUMBERS)),)](
            tensor, factor, tensor.numel(), BLOCK=SCALE_NUMBERS
        )


@triton.jit
def _softmax_row(
    logits, labels, temperatures, coefficients, logprobs, V, stride,
    BLOCK: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * stride
    scale = 1.4426950408889634  # log2(e)
    if HAS_TEMPERATURE:
        scale = scale / tl.load(temperatures + row)
    label = tl.load(labels + row)
    label_logit = tl.load(own + tl.maximum(label, 0)).to(tl.float32) * scale
    largest = tl.full((BLOCK,), -3.0e38, tl.float32)  # finite: the difference of two infinities is not a number
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logit = tl.load(own + columns, mask=columns < V, other=-float("inf")).to(tl.float32) * scale
        larger = tl.maximum(largest, logit)
        total = total * tl.exp2(largest - larger) + tl.exp2(logit - larger)
        largest = larger
    row_largest = tl.max(largest, axis=0)
    row_total = tl.sum(total * tl.exp2(largest - row_largest), axis=0)
    logprob = (label_logit - row_largest - tl.log2(row_total)) * 0.6931471805599453  # log(2)
    tl.store(logprobs + row, tl.where(label < 0, 0.0, logprob))
    if WRITES:
        coefficient = tl.load(coefficients + row)
        share = coefficient / row_total
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            logit = tl.load(own + columns, mask=columns < V, other=-float("inf")).to(tl.float32) * scale
            gradient = share * tl.exp2(logit - row_largest) - tl.where(columns == label, coefficient, 0.0)
            tl.store(own + columns, gradient.to(logits.dtype.element_ty), mask=columns < V)


@triton.jit
def _scale(numbers, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1.0:
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0) * BLOCK):
            places = first + tl.arange(0, BLOCK)
            number = tl.load(numbers + places, mask=places < count).to(tl.float32)
            tl.store(numbers + places, (number * by).to(numbers.dtype.element_ty), mask=places < count)
