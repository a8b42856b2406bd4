"""The operations of a model besides attention: linear, norm, rotary, router, experts, float8, token_loss, sampling,
drafting.

Each operation is a section with a function that the model calls, a `Need` (the properties of a call; a backend decides
from these alone whether it serves the call) and a `Dispatcher` over the folder of its backends, which bears its name.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from openmimo.core.registry import load_object
from openmimo.kernels.dispatch import Dispatcher
from openmimo.kernels.weights import FP8_TRAINED, PLAIN, BlockScaled, Float8Latent, Latent, Packed, Weight, format_of

LINEAR = Dispatcher("openmimo.kernels.linear", "OPENMIMO_LINEAR")
NORM = Dispatcher("openmimo.kernels.norm", "OPENMIMO_NORM")
ADD_NORM = Dispatcher("openmimo.kernels.add_norm", "OPENMIMO_ADD_NORM")
ROTARY = Dispatcher("openmimo.kernels.rotary", "OPENMIMO_ROTARY")
ROUTER = Dispatcher("openmimo.kernels.router", "OPENMIMO_ROUTER")
EXPERTS = Dispatcher("openmimo.kernels.experts", "OPENMIMO_EXPERTS")
FLOAT8 = Dispatcher("openmimo.kernels.float8", "OPENMIMO_FLOAT8")
TOKEN_LOSS = Dispatcher("openmimo.kernels.token_loss", "OPENMIMO_TOKEN_LOSS")
SAMPLING = Dispatcher("openmimo.kernels.sampling", "OPENMIMO_SAMPLING")
DRAFTING = Dispatcher("openmimo.kernels.drafting", "OPENMIMO_DRAFTING")

MIXED = "mixed"  # the weight format of a call whose weights have different formats
IGNORED_LABEL = -1
WeightAndBias = tuple[Weight, torch.Tensor | None]


# Linear layers: x W^T + b, with one weight or with several that share their input.
# R rows, D input dim, O output dim.


class LinearNeed(NamedTuple):
    """The properties of one call of linear layers.

    Attributes:
        num_rows: R if x is [R, D], else None.
        dtype: Dtype of x.
        needs_gradients: Whether autograd records the call.
        readable: Whether a backend may read weights and biases by address: they are contiguous and have the sizes that
            x requires, and plain ones have its dtype.
        on_cpu: Whether the tensors are in CPU memory.
        weight_format: The format of all weights (see `kernels.weights`), or "mixed".
        input_dim: D.
    """

    num_rows: int | None
    dtype: torch.dtype
    needs_gradients: bool
    readable: bool
    on_cpu: bool
    weight_format: str = PLAIN
    input_dim: int = 0


def linear(x: torch.Tensor, weight_OD: Weight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Map x [..., D] to [..., O]; see `joined_linear`."""
    return joined_linear(x, ((weight_OD, bias_O),))


def joined_linear(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> torch.Tensor:
    """Apply several linear layers to one input x [..., D] and concatenate the outputs: [..., sum of O], dtype of x.

    Args:
        x: The input. Differentiable.
        layers: Pairs of a weight [O, D] and a bias [O] or None. Plain weights and biases have the dtype of x and are
            differentiable. Quantized weights are constants. Products with weights in FP8 training are those of FLOAT8.
    """
    dtype, input_dim, readable, weight_format = x.dtype, x.shape[-1], True, None
    for weight_OD, bias_O in layers:
        if isinstance(weight_OD, (BlockScaled, Packed, Latent, Float8Latent)):
            this_format, fits = weight_OD.format, weight_OD.is_contiguous()
        else:
            this_format, fits = PLAIN, weight_OD.dtype == dtype and weight_OD.is_contiguous()
        if this_format != weight_format:
            weight_format = MIXED if weight_format else this_format
        if not fits or weight_OD.shape[1] != input_dim:
            readable = False
        elif bias_O is not None:
            readable &= bias_O.dtype == dtype and bias_O.shape == weight_OD.shape[:1] and bias_O.is_contiguous()
    if weight_format == FP8_TRAINED:
        return float8_product("linear")(x, layers)
    need = LinearNeed(
        x.shape[0] if x.dim() == 2 else None,
        dtype,
        torch.is_grad_enabled() and _is_trained(x, layers),
        readable,
        x.is_cpu,
        weight_format or PLAIN,
        input_dim,
    )
    return LINEAR.choose(need)[1].run(x, layers)


def _is_trained(x: torch.Tensor, layers: tuple[WeightAndBias, ...]) -> bool:
    return x.requires_grad or any(
        weight_OD.requires_grad or (bias_O is not None and bias_O.requires_grad) for weight_OD, bias_O in layers
    )


# Root-mean-square normalization (arXiv 1910.07467).


class NormNeed(NamedTuple):
    """The properties of one normalization.

    Attributes:
        num_numbers: Number of elements of x.
        dtype: Dtype of x and the weight.
        needs_gradients: Whether autograd records. It does not matter whether x or the weight requires a gradient, so
            that frozen parameters do not change the bits of a training step.
        readable: Whether the weight has as many elements as a row of x, and a summand the shape and dtype of x.
        on_cpu: Whether x is in CPU memory.
    """

    num_numbers: int
    dtype: torch.dtype
    needs_gradients: bool
    readable: bool
    on_cpu: bool


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Divide `x` [..., D] by its root mean square over D, and multiply by `weight` [D]. Keeps shape and dtype of x.

    The mean is computed in float32 (float64 for float64 x). The quotient is cast to the dtype of x before it is
    multiplied by the weight, as in Hugging Face transformers. Differentiable in x and weight.
    """
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    need = NormNeed(x.numel(), dtype, torch.is_grad_enabled(), weight.shape[0] == x.shape[-1], x.is_cpu)
    return NORM.choose(need)[1].run(x, weight, epsilon)


def add_rms_norm(
    x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x + added`, [..., D] in the dtype of x, and the normalization of this sum; see `rms_norm`.

    Both tensors have one shape and dtype. Differentiable in all tensors.
    """
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    readable = weight.shape[0] == x.shape[-1] and added.dtype == dtype and added.shape == x.shape
    need = NormNeed(x.numel(), dtype, torch.is_grad_enabled(), readable, x.is_cpu)
    return ADD_NORM.choose(need)[1].run(x, added, weight, epsilon)


# Rotary position embedding over the leading dims of each head (arXiv 2104.09864). T tokens, H heads, K head dim,
# R rotary dim (R <= K, even). Dim i is rotated with dim i + R/2, for i < R/2.


class RotaryNeed(NamedTuple):
    """The properties of one rotation.

    Attributes:
        num_numbers: Number of elements of x.
        dtype: Dtype of x.
        needs_gradients: Whether autograd records, as in `NormNeed`.
        readable: Whether both tables have the dtype and number of rows of x and equal strides, and the heads of x and
            the rows of the tables are contiguous.
        on_cpu: Whether x is in CPU memory.
    """

    num_numbers: int
    dtype: torch.dtype
    needs_gradients: bool
    readable: bool
    on_cpu: bool


def rotary_table(
    positions_T: torch.Tensor,
    rotary_dim: int,
    theta: float,
    dtype: torch.dtype,
    divisors: tuple[float, ...] = (),
    amplitude: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cos and sin of position * theta^(-2i/R), each [T, R] in `dtype`, in float32 (float64 for float64).

    The second half of a row repeats the first.

    Args:
        positions_T: Positions.
        rotary_dim: Rotated dims, R.
        theta: Base.
        dtype: Of the tables.
        divisors: Divisor of each of the R/2 frequencies (empty: none), for context extension.
        amplitude: Factor of cos and sin.

    Raises:
        ValueError: `rotary_dim` is odd.
    """
    if rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; it must be even")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, rotary_dim, 2, dtype=wide, device=positions_T.device) / rotary_dim
    frequencies = 1.0 / theta**exponents
    if divisors:
        frequencies = frequencies / torch.tensor(divisors, dtype=wide, device=positions_T.device)
    angles_TR = (positions_T.to(wide)[:, None] * frequencies).repeat(1, 2)
    cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin()
    if amplitude != 1.0:
        cos_TR, sin_TR = cos_TR * amplitude, sin_TR * amplitude
    return cos_TR.to(dtype), sin_TR.to(dtype)


def apply_rotary(x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate the first R dims of `x_THK` by the angles of each token; the other dims are copied.

    The tables must have the dtype of x, which the result has as well. Differentiable in x.
    """
    dtype = x_THK.dtype
    readable = (
        dtype == cos_TR.dtype
        and x_THK.stride(2) == cos_TR.stride(1) == 1
        and cos_TR.shape == sin_TR.shape
        and cos_TR.stride() == sin_TR.stride()
        and cos_TR.shape[0] == x_THK.shape[0]
    )
    need = RotaryNeed(x_THK.numel(), dtype, torch.is_grad_enabled(), readable, x_THK.is_cpu)
    return ROTARY.choose(need)[1].run(x_THK, cos_TR, sin_TR)


# The router of a sparse layer: sigmoid scores, and the top experts by score plus bias.
# T tokens, D model dim, E experts, A active experts a token.


class RoutingRule(NamedTuple):
    """How expert ids and weights follow from scores.

    Attributes:
        experts_per_token: A.
        num_groups: Number of groups of equal size into which consecutive experts are divided. With more than one, a
            token's experts come from its best groups. The score of a group is the sum of its two best biased scores.
        groups_per_token: Number of groups from which a token may choose.
        normalize_weights: Whether the weights of a token are divided by their sum.
        routed_scale: Factor of the weights.
    """

    experts_per_token: int
    num_groups: int = 1
    groups_per_token: int = 1
    normalize_weights: bool = True
    routed_scale: float = 1.0


class RouterNeed(NamedTuple):
    """The properties of one routing.

    Attributes:
        num_tokens: T.
        dtype: Dtype of x.
        weight_dtype: Dtype of the router's weight.
        grouped: Whether there is more than one group of experts.
        replayed: Whether the caller gives expert ids to replay.
        keep_scores: Whether the caller needs the scores of all experts.
        needs_gradients: Whether autograd records, as in `NormNeed`.
        readable: Whether the sizes of x and weight agree.
        on_cpu: Whether x is in CPU memory.
    """

    num_tokens: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    grouped: bool
    replayed: bool
    keep_scores: bool
    needs_gradients: bool
    readable: bool
    on_cpu: bool


def route(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor,
    rule: RoutingRule,
    *,
    replayed_TA: torch.Tensor | None = None,
    keep_scores: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Choose the experts of each token by sigmoid(x @ weight.T) + bias.

    Everything is computed in float32 (float64 for float64 x), which is also the dtype of weights and scores.
    Differentiable in x and weight, through weights and scores.

    Args:
        x_TD: Inputs of the layer.
        weight_ED: The router's weight.
        bias_E: Selection bias: added to the scores for the choice of experts only.
        rule: The choice of experts and their weights.
        replayed_TA: Expert ids that replace the router's choice where they are not negative.
        keep_scores: Whether to return the scores.

    Returns:
        Expert ids, int64 [T, A], best first; their weights [T, A], from the scores without the bias; and the scores of
        all experts [T, E], or None.
    """
    need = RouterNeed(
        x_TD.shape[0],
        x_TD.dtype,
        weight_ED.dtype,
        rule.num_groups > 1,
        replayed_TA is not None,
        keep_scores,
        torch.is_grad_enabled(),
        weight_ED.shape[1] == x_TD.shape[1],
        x_TD.is_cpu,
    )
    return ROUTER.choose(need)[1].run(x_TD, weight_ED, bias_E, rule, replayed_TA, keep_scores)


# The expert MLPs of a sparse layer: each token visits its A chosen experts, and their outputs are summed by weight.
# T tokens, D model dim, E experts, A active experts a token, F expert hidden dim. An expert is a SwiGLU:
# down(silu(gate(x)) * up(x)); `gate_up` holds the gate rows first (paper section 2.1).


class ExpertsNeed(NamedTuple):
    """The properties of one call of experts.

    Attributes:
        num_tokens: T.
        num_experts: E.
        experts_per_token: A.
        model_dim: D.
        expert_dim: F.
        dtype: Dtype of x.
        needs_gradients: Whether autograd records and an input requires a gradient.
        on_cpu: Whether x is in CPU memory.
        weight_format: The format of both weights (see `kernels.weights`), or "mixed".
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
    """Count the choices of each expert, int64 [E]. Unlike `torch.bincount`, does not synchronize with a GPU."""
    ids_M = expert_ids_TA.flatten()
    return ids_M.new_zeros(num_experts).scatter_add_(0, ids_M, torch.ones_like(ids_M))


def apply_experts(
    x_TD: torch.Tensor,
    expert_ids_TA: torch.Tensor,
    weights_TA: torch.Tensor,
    gate_up_EHD: Weight,
    down_EDF: Weight,
) -> torch.Tensor:
    """Sum each token's experts by weight, [T, D] in the dtype of x, accumulated in float32 (float64 for float64).

    Differentiable in all tensors except quantized weights.

    Args:
        x_TD: Inputs.
        expert_ids_TA: Chosen experts, integer.
        weights_TA: Weights of the chosen experts, float32.
        gate_up_EHD: Gate and up weights [E, 2F, D], in the dtype of x or quantized.
        down_EDF: Down weights [E, D, F], in the same form. Products in FP8 training are those of FLOAT8.
    """
    num_tokens, model_dim = x_TD.shape
    num_experts, _, expert_dim = down_EDF.shape
    weight_format = format_of(gate_up_EHD)
    if weight_format == FP8_TRAINED:
        return float8_product("experts")(x_TD, expert_ids_TA, weights_TA, gate_up_EHD, down_EDF)
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
    _, backend = EXPERTS.choose(need)
    return backend.run(x_TD, expert_ids_TA, weights_TA, gate_up_EHD, down_EDF, need=need)


# Products in FP8 training: both operands are float8_e4m3fn, with scales for 1 x 128 numbers of activations and
# gradients and for 128 x 128 of weights, and sums are float32 (DeepSeek-V3, arXiv 2412.19437, section 3.3).
# P rows, in groups that have a weight each (experts; a linear layer is one group), C and O the dims of a weight [O, C].


class Float8Need(NamedTuple):
    """The properties of the products of one layer; a backend decides from these alone whether it serves them.

    Attributes:
        dims: Input dims and output dims of all matrices.
        num_groups: Number of groups.
        dtype: Dtype of activations.
        on_cpu: Whether the tensors are in CPU memory.
    """

    dims: tuple[int, ...]
    num_groups: int
    dtype: torch.dtype
    on_cpu: bool


@dataclass(frozen=True)
class Float8Functions:
    """The functions of one backend. Those of `reference` define codes and scales to the bit, and products up to the
    order of float32 sums.

    The rows of a group begin at a multiple of 128. `ends` are their ends, int32 [groups], multiples of 128 as well;
    None if there is one group of all rows. Results for rows behind the last group are undefined.

    Attributes:
        quantize: rows [N, C], places int64 [P] or None, whether to give the second result. Returns the codes of the
            rows [P, C] that the places name (zeros for -1; None: all rows in order), with scales for 1 x 128, and
            those of the transposed matrix [C, P], or None.
        quantize_weight: weights [O, C] or [groups, O, C] to stack along the rows, whether to transpose. Returns codes
            [groups, O, C] or [groups, C, O], with a scale for a block of 128 x 128.
        multiply: codes of rows [P, K], of a weight [groups, N, K], ends, dtype of the result [P, N].
        weight_gradient: transposed codes [O, P] and [C, P], ends. Returns float32 [groups, O, C].
        gate: gate and up [P, 2F], weights of the rows float32 [P], whether they are for a backward pass. Returns the
            codes of silu(gate) * up * weight [P, F], and those of gate and up, or None.
        gate_backward: codes of gate and up, weights, gradient of silu(gate) * up * weight, whether to give transposed
            codes. Returns the transposed codes of that product [F, P] or None, both codes of the gradient of gate and
            up, as `quantize` does, and the gradient of the weights, float32 [P].
    """

    quantize: Callable[[torch.Tensor, torch.Tensor | None, bool], tuple[BlockScaled, BlockScaled | None]]
    quantize_weight: Callable[[tuple[Float8Latent, ...], bool], BlockScaled]
    multiply: Callable[[BlockScaled, BlockScaled, torch.Tensor | None, torch.dtype], torch.Tensor]
    weight_gradient: Callable[[BlockScaled, BlockScaled, torch.Tensor | None], torch.Tensor]
    gate: Callable[[torch.Tensor, torch.Tensor, bool], tuple[BlockScaled, BlockScaled | None]]
    gate_backward: Callable[
        [BlockScaled, torch.Tensor, torch.Tensor, bool],
        tuple[BlockScaled | None, BlockScaled, BlockScaled | None, torch.Tensor],
    ]


@functools.cache
def float8_product(name: str) -> Callable[..., torch.Tensor]:
    """Return the differentiable `linear` or `experts`, whose file is imported by the runs that train in FP8."""
    function: Callable[..., torch.Tensor] = load_object(f"openmimo.kernels.float8._products:{name}")
    return function


# Log-probabilities and losses of tokens, computed from hidden states without keeping logits. The softmax computes in
# float32, or float64 for float64 inputs. T tokens, D model dim, V vocabulary.


class TokenLossNeed(NamedTuple):
    """The properties of one call of a token loss.

    Attributes:
        dtype: Dtype of hidden and weight.
        on_cpu: Whether they are in CPU memory.
    """

    dtype: torch.dtype
    on_cpu: bool


@dataclass(frozen=True)
class TokenLossFunctions:
    """The functions of one backend.

    Attributes:
        logprobs: hidden [T, D], weight [V, D], labels [T], temperature: see `token_logprobs`.
        loss: hidden [T, D], weight [V, D], labels [T], weights [T]: see `token_loss`; every row counts.
        argmax: hidden [T, D], weight [V, D]: see `token_argmax`.
        joined: hidden [T, D], weight [V, D] of any dtype, labels [T], weights [T]: see `joined_token_loss`; every row
            counts. None: the backend computes heads one after another.
    """

    logprobs: Callable[..., torch.Tensor]
    loss: Callable[..., torch.Tensor]
    argmax: Callable[..., torch.Tensor]
    joined: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None


def token_logprobs(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, *, temperature: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """Return log p(label) under softmax(hidden @ weight.T / temperature), float32 [T] (float64 for float64 inputs).

    Differentiable in hidden and weight.

    Args:
        hidden_TD: Final hidden states.
        weight_VD: Weight of the output head.
        labels_T: Integer token ids. A label of -1 is ignored: the result is 0 and has no gradient.
        temperature: One number or [T]. It divides the logits in the dtype of the result, as in the engine's sampler.
    """
    return _functions(hidden_TD).logprobs(hidden_TD, weight_VD, labels_T, temperature)


def token_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    weights_T: torch.Tensor,
    *,
    num_kept: int | None = None,
) -> torch.Tensor:
    """Return -sum over tokens of weights_T * log p(label), a float32 scalar (float64 for float64 inputs).

    Labels as in `token_logprobs`. Rows with label -1 or weight 0 are dropped before any arithmetic. Differentiable in
    hidden and weight, not in `weights_T`.

    Args:
        hidden_TD: Final hidden states.
        weight_VD: Weight of the output head.
        labels_T: Integer token ids.
        weights_T: Weight of each token.
        num_kept: Exact number of rows that are not dropped (None: the host waits for the device to count them).
    """
    hidden_TD, labels_T, weights_T = kept_rows(hidden_TD, labels_T, weights_T, num_kept)
    return _functions(hidden_TD).loss(hidden_TD, weight_VD, labels_T, weights_T.detach())


def joins_heads(hidden_TD: torch.Tensor) -> bool:
    """Return whether the backend for these states has `joined_token_loss`."""
    return _functions(hidden_TD).joined is not None


def joined_token_loss(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of several heads that share the output head, from their rows in one tensor; see `joins_heads`.

    Differentiable once, in hidden and weight.

    Args:
        hidden_TD: Final hidden states of all heads.
        weight_VD: Weight of the output head in any dtype, which its gradient has as well.
        labels_T: Integer token ids, none of which is -1.
        weights_T: Weight of each row in the loss.

    Returns:
        The loss, as `token_loss`, and log p(label) of each row without gradient, float32 [T].
    """
    joined = _functions(hidden_TD).joined
    assert joined is not None, "the caller has asked joins_heads"
    return joined(hidden_TD, weight_VD, labels_T, weights_T.detach())


def kept_rows(
    hidden_TD: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor, num_kept: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rows that have a label and a weight; arguments as in `token_loss`."""
    if num_kept == len(labels_T):
        return hidden_TD, labels_T, weights_T
    is_kept_T = (labels_T != IGNORED_LABEL) & (weights_T != 0)
    found = torch.nonzero(is_kept_T) if num_kept is None else torch.nonzero_static(is_kept_T, size=num_kept)
    if len(found) == len(labels_T):
        return hidden_TD, labels_T, weights_T
    kept = found.squeeze(1)
    return hidden_TD[kept], labels_T[kept], weights_T[kept]


def token_argmax(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Return the most probable token of each row, LongTensor [T]. Not differentiable."""
    return _functions(hidden_TD).argmax(hidden_TD.detach(), weight_VD.detach())


def _functions(hidden_TD: torch.Tensor) -> TokenLossFunctions:
    return TOKEN_LOSS.choose(TokenLossNeed(hidden_TD.dtype, hidden_TD.is_cpu))[1].run


# Sampling: one token of each row of logits.
# R rows, V vocabulary.


class SamplingNeed(NamedTuple):
    """The properties of one call; a backend decides from these alone whether it serves the call.

    Attributes:
        vocab_size: V.
        dtype: Dtype of the logits.
        on_cpu: Whether the logits are in CPU memory.
        readable: Whether the logits of a row are contiguous.
    """

    vocab_size: int
    dtype: torch.dtype
    on_cpu: bool
    readable: bool


@dataclass(frozen=True)
class SamplingFunctions:
    """The functions of a backend.

    Attributes:
        draw: Implements `draw_tokens`.
        logprobs: Implements `chosen_logprobs`.
    """

    draw: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]
    logprobs: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
    ]


def draw_tokens(
    logits_RV: torch.Tensor, numbers_5R: torch.Tensor, uniform_R: torch.Tensor, *, has_filters: bool
) -> torch.Tensor:
    """Draw a token of each row, int64 [R]: the inverse of the cumulative distribution, in the order of token ids.

    The distribution is the softmax at the row's temperature, filtered. Top-p keeps the smallest set of the most likely
    tokens that holds that probability, top-k at most that many tokens, and min-p the tokens at least that fraction as
    likely as the likeliest. Of equally likely tokens, those with the smaller ids are kept first.

    Args:
        logits_RV: Logits. A row whose largest logit is not finite gives any token.
        numbers_5R: Temperature, top-p (2: none), top-k (infinite: none), min-p, and a number that is not read; float64.
        uniform_R: A number in [0, 1) for each row, float64.
        has_filters: Whether a row has top-p, top-k or min-p.
    """
    return _sampling(logits_RV).draw(logits_RV, numbers_5R, uniform_R, has_filters)


def chosen_logprobs(
    logits_RV: torch.Tensor, tokens_R: torch.Tensor, temperature_R: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return log-probabilities of tokens at the temperature of their row.

    Args:
        logits_RV: Logits.
        tokens_R: A token of each row.
        temperature_R: The temperatures, float64.
        num_top: How many of the likeliest tokens are returned.

    Returns:
        Log-probabilities [R] of the tokens; ids and log-probabilities [R, num_top] of the likeliest ones, None if
        `num_top` is 0.
    """
    return _sampling(logits_RV).logprobs(logits_RV, tokens_R, temperature_R, num_top)


def _sampling(logits_RV: torch.Tensor) -> SamplingFunctions:
    need = SamplingNeed(logits_RV.shape[1], logits_RV.dtype, logits_RV.is_cpu, logits_RV.stride(1) == 1)
    return SAMPLING.choose(need)[1].run


# Drafting: the rows of a step with drafts, where only the device knows the lengths of the texts.
# X seats, M numbers of a row of memory, B sequences, H heads that draft, L = H + 1, Q rows of all passes, p parts and
# Y rows of page tables. See `openmimo.engine.ahead`.

# The random number of a position is a hash of key and position: splitmix64 (Steele et al. 2014).
MIX_ADDEND, MIX_ROUNDS, MIX_LAST_SHIFT = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)), 31
UNIFORM_BITS = 52  # one fewer than float64 holds, so that u < 1 and u * total < total survive rounding
ROW_LENGTH, ROW_STATES_START, ROW_KEY, ROW_HEADS = range(4)  # numbers of a row; `DraftingSizes` says what follows


class DraftingSizes(NamedTuple):
    """The sizes of a step with drafts.

    The memory has a row of numbers for each seat: the tokens of the text, the first position whose state is kept, the
    key of its random numbers, the positions that each of `num_drafts` heads has computed, and a ring of the newest
    tokens. The passes of the heads come before that of the main layers.

    Attributes:
        num_heads: H.
        num_drafts: Heads that may draft.
        ring_positions: Places of a ring of tokens or states, a power of two. Position i is in place i % ring_positions.
        head_rows: Rows of the pass of a head.
        main_rows: Rows of the pass of the main layers.
        spare_place: A place for states that is not read.
    """

    num_heads: int
    num_drafts: int
    ring_positions: int
    head_rows: int
    main_rows: int
    spare_place: int

    @property
    def first_token(self) -> int:
        """The first number of a ring of tokens."""
        return ROW_HEADS + self.num_drafts

    @property
    def num_rows(self) -> int:
        """Q."""
        return self.num_heads * self.head_rows + self.main_rows


class DraftingRows(NamedTuple):
    """The rows of all passes of a step. A pass has the rows of each sequence in order, then surplus rows.

    Attributes:
        counts_LB: Rows of each sequence in each pass, int32; the last pass is that of the main layers.
        keys_LB: Keys that the sequences have after each pass, int32; 0 for those without rows.
        first_LB: The first row of each sequence in its pass, int64.
        last_LB: The last row of each, int64; any for those without rows.
        sequence_Q: The sequence of each row, int64; any for surplus rows.
        position_Q: Its position, int64; 0 for surplus rows.
        is_row_Q: False for surplus rows.
        state_Q: The place of its state, int64; the spare one for surplus rows.
        token_Q: Its token, int64, if `source_Q` is negative.
        source_Q: The place of its token in `tokens_LB`, int64.
        uniform_Q: The random number after it, float64.
        seat_Q: Its seat, int64.
        tokens_LB: The newest token of each sequence, and zeros for the drafts of each head, int64.
    """

    counts_LB: torch.Tensor
    keys_LB: torch.Tensor
    first_LB: torch.Tensor
    last_LB: torch.Tensor
    sequence_Q: torch.Tensor
    position_Q: torch.Tensor
    is_row_Q: torch.Tensor
    state_Q: torch.Tensor
    token_Q: torch.Tensor
    source_Q: torch.Tensor
    uniform_Q: torch.Tensor
    seat_Q: torch.Tensor
    tokens_LB: torch.Tensor


class DraftingNeed(NamedTuple):
    """The properties of one call; a backend decides from these alone whether it serves the call.

    Attributes:
        on_cpu: Whether the tensors are in CPU memory.
    """

    on_cpu: bool


@dataclass(frozen=True)
class DraftingFunctions:
    """The functions of a backend.

    Attributes:
        plan: Implements `plan_drafting`.
        slots: Implements `drafting_slots`.
        insert: Implements `insert_drafts`.
        advance: Implements `advance_texts`.
    """

    plan: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, DraftingSizes], DraftingRows]
    slots: Callable[[torch.Tensor, DraftingRows, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
    insert: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    advance: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, DraftingRows, torch.Tensor, DraftingSizes],
        tuple[torch.Tensor, torch.Tensor],
    ]


def signed(value: int) -> int:
    """Return the signed number with the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def plan_drafting(
    rows_XM: torch.Tensor,
    seats_B: torch.Tensor,
    limits_B: torch.Tensor,
    max_lengths_B: torch.Tensor,
    sizes: DraftingSizes,
) -> DraftingRows:
    """Plan the rows of a step. Head h reads the positions that it has not computed, and drafts where the step has more
    than h drafts of a sequence. The main layers read the newest token and the drafts.

    Args:
        rows_XM: The memory, int64.
        seats_B: The seat of each sequence, int64.
        limits_B: The most drafts of each sequence, int64; -1 for no rows at all. There are fewer where the text would
            be longer than its limit, and none where the first head has no position to compute.
        max_lengths_B: The most tokens of each text, int64.
        sizes: The sizes.
    """
    return _drafting(rows_XM).plan(rows_XM, seats_B, limits_B, max_lengths_B, sizes)


def drafting_slots(
    tables_pBY: torch.Tensor, rows: DraftingRows, whole_from_B: torch.Tensor, page_positions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the page of each row in each part of a group of layers, int64 [p, Q], and its offset there, int64 [Q].

    The page is -1 for surplus rows, and for positions before `whole_from_B` of their sequence.

    Args:
        tables_pBY: Page tables, int32.
        rows: The rows.
        whole_from_B: int64.
        page_positions: Positions of a page, a power of two.
    """
    return _drafting(tables_pBY).slots(tables_pBY, rows, whole_from_B, page_positions)


def insert_drafts(token_T: torch.Tensor, source_T: torch.Tensor, tokens_LB: torch.Tensor) -> torch.Tensor:
    """Return the tokens of a pass: `token_T` where `source_T` is negative, else the entry of `tokens_LB` that it names.

    Args:
        token_T: int64.
        source_T: int64.
        tokens_LB: `DraftingRows.tokens_LB`, with drafts.
    """
    return _drafting(token_T).insert(token_T, source_T, tokens_LB)


def advance_texts(
    rows_XM: torch.Tensor,
    seats_B: torch.Tensor,
    max_lengths_B: torch.Tensor,
    rows: DraftingRows,
    decided_T: torch.Tensor,
    sizes: DraftingSizes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the leading drafts that equal the decided tokens, and return the rows of memory after the step, [B, M].

    The ring gets rejected tokens as well: it is larger than what a head reads again, and the next step overwrites them.

    Args:
        rows_XM: The memory, which is not changed.
        seats_B: As in `plan_drafting`.
        max_lengths_B: As in `plan_drafting`.
        rows: The plan, with drafts.
        decided_T: The token after each row of the pass of the main layers, int64; negative if none can be chosen.
        sizes: The sizes.

    Returns:
        The new rows, and for each sequence its drafts, how many were accepted, and the L tokens from its first row
        on: int64 [B, L + 2].
    """
    return _drafting(rows_XM).advance(rows_XM, seats_B, max_lengths_B, rows, decided_T, sizes)


def _drafting(tensor: torch.Tensor) -> DraftingFunctions:
    functions: DraftingFunctions = DRAFTING.choose(DraftingNeed(tensor.is_cpu))[1].run
    return functions
