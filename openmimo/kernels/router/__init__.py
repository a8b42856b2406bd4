"""The router of a sparse layer: sigmoid scores, and the best experts by score plus a bias.

T tokens, D model dim, E experts, A active experts a token.
"""

from typing import NamedTuple

import torch

from openmimo.kernels.dispatch import Dispatcher

DISPATCHER = Dispatcher("openmimo.kernels.router", "OPENMIMO_ROUTER")


class RoutingRule(NamedTuple):
    """How scores become choices and weights.

    Attributes:
        experts_per_token: A.
        num_groups: Experts stand in groups of equal size. With more than one, a token's experts come from its
            `groups_per_token` best groups; a group is as good as the sum of its two best biased scores.
        groups_per_token: The number of groups that are open to a token.
        normalize_weights: Whether the weights of a token are divided by their sum.
        routed_scale: Multiplies the weights.
    """

    experts_per_token: int
    num_groups: int = 1
    groups_per_token: int = 1
    normalize_weights: bool = True
    routed_scale: float = 1.0


class RouterNeed(NamedTuple):
    """Everything about one call that a backend may look at.

    Attributes:
        num_tokens: T.
        dtype: Of x.
        weight_dtype: Of the router's weight.
        grouped: Whether there is more than one group of experts.
        replayed: Whether some choices are given.
        keep_scores: Whether the caller wants the scores of all experts.
        needs_gradients: Whether autograd records, as in `NormNeed`.
        readable: Whether the sizes of x and weight agree.
        on_cpu: Whether x lies in the memory of the CPU.
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
    """Expert ids, int64 [T, A], best first by score plus `bias_E`; their weights [T, A]; and all scores [T, E] or None.

    Scores are sigmoid(x @ weight.T). A weight is the score, without the bias. Everything runs in float32 (float64 for
    float64 x), which is also the dtype of weights and scores. Where `replayed_TA` is not negative it is the choice.
    Differentiable in x and weight, through weights and scores.
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
