"""The definition, with the gradients of autograd.

T tokens, D model dim, E experts, A active experts a token.
"""

import torch
import torch.nn.functional as F

from openmimo.kernels.dispatch import Backend
from openmimo.kernels.operations import RoutingRule


def run(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor,
    rule: RoutingRule,
    replayed_TA: torch.Tensor | None,
    keep_scores: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Implement `openmimo.kernels.operations.route`."""
    dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    scores_TE = F.linear(x_TD.to(dtype), weight_ED.to(dtype)).sigmoid()
    ids_TA = _choose(scores_TE.detach() + bias_E, rule)
    if replayed_TA is not None:
        replayed_TA = replayed_TA.to(ids_TA.device, torch.int64)
        ids_TA = torch.where(replayed_TA < 0, ids_TA, replayed_TA)
    weights_TA = scores_TE.gather(1, ids_TA)
    if rule.normalize_weights:
        weights_TA = weights_TA / (weights_TA.sum(dim=-1, keepdim=True) + 1e-20)
    if rule.routed_scale != 1.0:
        weights_TA = weights_TA * rule.routed_scale
    return ids_TA, weights_TA, scores_TE if keep_scores else None


def _choose(biased_TE: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
    if rule.num_groups > 1:
        groups = biased_TE.view(len(biased_TE), rule.num_groups, -1)
        group_scores = groups.topk(2, dim=-1).values.sum(dim=-1)
        best = group_scores.topk(rule.groups_per_token, dim=-1).indices
        open_groups = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
        biased_TE = groups.masked_fill(~open_groups[..., None], float("-inf")).flatten(1)
    return biased_TE.topk(rule.experts_per_token, dim=-1).indices


PLUGIN = Backend(priority=0, run=run, refuse=lambda need: None)
