"""The router of a sparse layer: sigmoid scores, and the top experts by score plus bias.

T tokens, D model dim, E experts, A active experts a token.
"""

from typing import NamedTuple

import torch

from openmimo.kernels.dispatch import Dispatcher

DISPATCHER = Dispatcher("openmimo.kernels.router", "OPENMIMO_ROUTER")


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
    """The properties of one call; a backend decides from these alone whether it serves the call.

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
    return DISPATCHER.choose(need)[1].run(x_TD, weight_ED, bias_E, rule, replayed_TA, keep_scores)
