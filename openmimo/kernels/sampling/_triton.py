"""Triton kernels of sampling, a program for each row.

Tokens in order of their probability, ties by id, fall into a kept part and a dropped one. A logit therefore decides:
all tokens above it are kept, none below, and of those with exactly this logit the first few.

    order       t7    t2    t9    t4    t1 ...
    before      0    .40   .65   .80   .91      probability before the token; kept while it is below top-p
    rank        0     1     2     3     4       kept while it is below top-k

The search for that logit works on 32-bit integers in the order of the logits. A pass over the row tries three values,
which leaves a quarter of the range. Probabilities of the search are float32, their sums float64; the draw is float64.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 4096
_LOWEST, _MANY = tl.constexpr(-(1 << 31)), tl.constexpr((1 << 31) - 1)


def draw_rows(
    logits_RV: torch.Tensor, numbers_5R: torch.Tensor, uniform_R: torch.Tensor, *, has_filters: bool
) -> torch.Tensor:
    """Arguments as in `openmimo.kernels.operations.draw_tokens`."""
    R, V = logits_RV.shape
    tokens_R = torch.empty(R, dtype=torch.int64, device=logits_RV.device)
    _draw[(R,)](
        logits_RV, numbers_5R.contiguous(), uniform_R, tokens_R, logits_RV.stride(0), R, V,
        BLOCK=min(_BLOCK, triton.next_power_of_2(V)), HAS_FILTERS=has_filters, num_warps=16,
    )  # fmt: skip
    return tokens_R


def log_sums(logits_RV: torch.Tensor, temperature_R: torch.Tensor) -> torch.Tensor:
    """The logarithm of the sum of exp(logit / temperature) of each row, float32 [R]."""
    R, V = logits_RV.shape
    sums_R = torch.empty(R, dtype=torch.float32, device=logits_RV.device)
    _log_sum[(R,)](
        logits_RV, temperature_R.contiguous(), sums_R, logits_RV.stride(0), V,
        BLOCK=min(_BLOCK, triton.next_power_of_2(V)), num_warps=16,
    )  # fmt: skip
    return sums_R


@triton.jit
def _largest(row, V, BLOCK: tl.constexpr):
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, V, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(row + ids, mask=ids < V, other=float("-inf")))
    return tl.max(largest)


@triton.jit
def _in_order(logits):
    """Integers in the order of the logits; both zeros are equal."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _above(row, limit, largest, scale, V, BLOCK: tl.constexpr):
    """Weight and number of the tokens above a limit in the order."""
    weights = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, V, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        logits = tl.load(row + ids, mask=ids < V, other=float("-inf"))
        is_above = (_in_order(logits) > limit) & (ids < V)
        weights += tl.where(is_above, tl.exp((logits - largest) * scale), 0.0)
        count += is_above.to(tl.int32)
    return tl.sum(weights.to(tl.float64)), tl.sum(count)


@triton.jit
def _above_three(row, limit_a, limit_b, limit_c, largest, scale, V, BLOCK: tl.constexpr):
    """As `_above`, for three limits in one pass."""
    weights_a, weights_b, weights_c = (
        tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    )  # fmt: skip
    count_a, count_b, count_c = (
        tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    )  # fmt: skip
    for first in range(0, V, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        logits = tl.load(row + ids, mask=ids < V, other=float("-inf"))
        places = _in_order(logits)
        weight = tl.where(ids < V, tl.exp((logits - largest) * scale), 0.0)
        weights_a += tl.where(places > limit_a, weight, 0.0)
        weights_b += tl.where(places > limit_b, weight, 0.0)
        weights_c += tl.where(places > limit_c, weight, 0.0)
        count_a += ((places > limit_a) & (ids < V)).to(tl.int32)
        count_b += ((places > limit_b) & (ids < V)).to(tl.int32)
        count_c += ((places > limit_c) & (ids < V)).to(tl.int32)
    return (
        tl.sum(weights_a.to(tl.float64)), tl.sum(weights_b.to(tl.float64)), tl.sum(weights_c.to(tl.float64)),
        tl.sum(count_a), tl.sum(count_b), tl.sum(count_c),
    )  # fmt: skip


@triton.jit
def _draw(
    logits, numbers, uniforms, tokens, stride, num_rows, V, BLOCK: tl.constexpr, HAS_FILTERS: tl.constexpr
):  # fmt: skip
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * stride
    temperature = tl.load(numbers + number)
    largest = _largest(row, V, BLOCK)
    limit = tl.full((), _LOWEST, tl.int64)  # the smallest kept logit in the order
    num_ties = tl.full((), _MANY, tl.int64)  # kept tokens that have it
    drops_ties = num_ties < 0
    if HAS_FILTERS:
        top_p, top_k = tl.load(numbers + num_rows + number), tl.load(numbers + 2 * num_rows + number)
        min_p = tl.load(numbers + 3 * num_rows + number)
        scale = (1.0 / temperature).to(tl.float32)
        if (top_p < 1.5) | (top_k < V):
            total, _ = _above(row, limit - 1, largest, scale, V, BLOCK)
            low, high = limit, _in_order(largest).to(tl.int64)
            while low < high:
                step = (high - low) // 4
                a, b, c = low + step, low + 2 * step, low + 3 * step
                weight_a, weight_b, weight_c, count_a, count_b, count_c = _above_three(
                    row, a, b, c, largest, scale, V, BLOCK
                )
                fits_a = (weight_a < top_p * total) & (count_a < top_k)
                fits_b = (weight_b < top_p * total) & (count_b < top_k)
                fits_c = (weight_c < top_p * total) & (count_c < top_k)
                low = tl.where(fits_a, low, tl.where(fits_b, a + 1, tl.where(fits_c, b + 1, c + 1)))
                high = tl.where(fits_a, a, tl.where(fits_b, b, tl.where(fits_c, c, high)))
            limit = low
            weight, count = _above(row, limit, largest, scale, V, BLOCK)
            through, reached = _above(row, limit - 1, largest, scale, V, BLOCK)
            num_equal = reached - count
            each = (through - weight) / tl.maximum(num_equal, 1).to(tl.float64)
            by_weight = tl.where(each > 0.0, tl.ceil((top_p * total - weight) / each), _MANY)
            num_ties = tl.minimum(tl.minimum(by_weight, top_k - count), _MANY).to(tl.int64)
            num_ties = tl.maximum(num_ties, 1)
            drops_ties = num_ties < num_equal
    kept = tl.full((), 0.0, tl.float64)
    token = tl.full((), V, tl.int64)
    for turn in range(0, 2):  # the first sums, the second finds the token
        aim = tl.load(uniforms + number) * kept
        passed = tl.full((), 0.0, tl.float64)
        ties = tl.full((), 0, tl.int64)
        for first in range(0, V, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            values = tl.load(row + ids, mask=ids < V, other=float("-inf"))
            weights = tl.exp((values.to(tl.float64) - largest.to(tl.float64)) / temperature)
            is_kept = ids < V
            if HAS_FILTERS:
                places = _in_order(values).to(tl.int64)
                is_tie = (places == limit) & is_kept
                is_kept = is_kept & (places >= limit) & (weights >= min_p)
                if drops_ties:
                    tie_number = tl.cumsum(is_tie.to(tl.int32), axis=0)
                    is_kept = is_kept & (~is_tie | (ties + tie_number <= num_ties))
                    ties += tl.max(tie_number)
            weights = tl.where(is_kept, weights, 0.0)
            through = passed + tl.sum(weights)
            if (turn == 1) & (token == V) & (through > aim):
                is_past = (passed + tl.cumsum(weights, axis=0) > aim) & is_kept
                # Rounding may leave the aim behind the last token of the block.
                last = tl.max(tl.where(is_kept & (weights > 0.0), ids, 0))
                token = tl.minimum(tl.min(tl.where(is_past, ids, V)), last).to(tl.int64)
            passed = through
        kept = passed
    tl.store(tokens + number, tl.minimum(token, V - 1))


@triton.jit
def _log_sum(logits, temperatures, sums, stride, V, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * stride
    scale = (1.0 / tl.load(temperatures + number)).to(tl.float32)
    largest = _largest(row, V, BLOCK)
    weights = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        values = tl.load(row + ids, mask=ids < V, other=float("-inf"))
        weights += tl.exp((values - largest) * scale)
    tl.store(sums + number, tl.log(tl.sum(weights)) + largest * scale)
