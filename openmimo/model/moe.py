"""Sparse feed-forward layers: a sigmoid router in float32, top-k by biased score, and expert MLPs.

T tokens, D model dim, E experts, A active experts, F expert hidden dim.

Load balancing (paper section 3.1) has two parts. After each optimizer step, `update_selection_bias` moves the selection
bias of each expert towards the mean load, without gradient. A small sequence-level loss adds its gradient directly at
the router, so that the loss need not be passed through the rest of the model.
"""

from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from openmimo.kernels.operations import RoutingRule, apply_experts, route
from openmimo.model.config import MoEConfig
from openmimo.model.context import AttentionContext, RouterLoss
from openmimo.model.weight_formats import QuantizableModule


class Router(nn.Module):
    """Chooses and weights experts by their scores. The selection bias affects the choice only, never the weights.

    Args:
        model_dim: D.
        moe: The sparse layers of the model.
        index: Index of the layer under which routes are recorded and replayed.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(self, model_dim: int, moe: MoEConfig, index: int):
        super().__init__()
        self.index = index
        self.rule = RoutingRule(
            moe.experts_per_token, moe.num_groups, moe.groups_per_token, moe.normalize_weights, moe.routed_scale
        )
        self.weight = nn.Parameter(torch.empty(moe.num_experts, model_dim))
        self.register_buffer("e_score_correction_bias", torch.zeros(moe.num_experts))

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the chosen expert ids, int64 [T, A], and their weights, float32 [T, A] (float64 for float64 x).

        Adds the gradients of the losses of the context's `router_loss`.
        """
        routing, losses = context.routing, context.router_loss
        has_loss = losses is not None and torch.is_grad_enabled()
        ids_TA, weights_TA, scores_TE = route(
            x_TD,
            self.weight,
            self.e_score_correction_bias,
            self.rule,
            replayed_TA=routing.replayed.get(self.index),
            keep_scores=has_loss,
        )
        if has_loss:
            assert losses is not None and scores_TE is not None
            loss = losses.balance_weight * balance_loss(scores_TE, ids_TA, losses, self.index)
            if losses.z_weight:
                loss = loss + losses.z_weight * z_loss(x_TD, self.weight, losses)
            weights_TA = _AddLoss.apply(weights_TA, loss)
        if routing.record:
            routing.recorded[self.index] = ids_TA
        return ids_TA, weights_TA

    @torch.no_grad()
    def update_selection_bias(self, load_E: torch.Tensor, rate: float | torch.Tensor) -> None:
        """Move each expert's bias by `rate` towards the mean load (aux-loss-free balancing, arXiv 2408.15664).

        The mean of the bias is kept at zero: a common offset changes no choice, but would drift.

        Args:
            load_E: Number of tokens that chose each expert in the last optimizer step.
            rate: Step size.
        """
        load_E = load_E.to(self.e_score_correction_bias.dtype)
        step_E = rate * torch.sign(load_E.mean() - load_E)
        self.e_score_correction_bias += step_E - step_E.mean()


class Experts(QuantizableModule):
    """The expert MLPs, stacked: gate and up rows [E, 2F, D] (gate first) and down [E, D, F]."""

    quantizable = MappingProxyType({"gate_up_proj": 2, "down_proj": 1})

    def __init__(self, model_dim: int, moe: MoEConfig):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.expert_dim, model_dim))
        self.down_proj = nn.Parameter(torch.empty(moe.num_experts, model_dim, moe.expert_dim))

    def forward(self, x_TD: torch.Tensor, ids_TA: torch.Tensor, weights_TA: torch.Tensor) -> torch.Tensor:
        """Map [T, D] to [T, D]."""
        gate_up_EHD, down_EDF = self.weight_as("gate_up_proj", x_TD.dtype), self.weight_as("down_proj", x_TD.dtype)
        return apply_experts(x_TD, ids_TA, weights_TA, gate_up_EHD, down_EDF)


class MoE(nn.Module):
    """A router and its experts, without a shared expert."""

    def __init__(self, model_dim: int, moe: MoEConfig, index: int):
        super().__init__()
        self.gate = Router(model_dim, moe, index)
        self.experts = Experts(model_dim, moe)

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Map [T, D] to [T, D]."""
        ids_TA, weights_TA = self.gate(x_TD, context)
        return self.experts(x_TD, ids_TA, weights_TA)


def balance_loss(scores_TE: torch.Tensor, ids_TA: torch.Tensor, losses: RouterLoss, layer: int) -> torch.Tensor:
    """Return the mean over sequences of sum_e f_e P_e (DeepSeek-V3 equations 17-20), which is 1 for an even load.

    f_e is E times the fraction of the sequence's choices that are expert e, and P_e is the mean normalized score of e.
    The sequences are training rows, as in that paper. With `losses.load_before`, f_e is that of the whole batch so far
    (arXiv 2501.11873), so that a sequence may prefer some experts. If several processes hold the tokens of a sequence,
    the sum of their results is the loss, and the gradient of each is that of its own tokens.
    """
    E, A = scores_TE.shape[1], ids_TA.shape[1]
    ones_TA = torch.ones_like(ids_TA, dtype=scores_TE.dtype)
    chosen_TE = torch.zeros_like(scores_TE).scatter_(1, ids_TA, ones_TA)
    normalized_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    zeros = scores_TE.new_zeros(losses.num_sequences, E)
    length = zeros[:, :1].index_add(0, losses.sequence_T, torch.ones_like(scores_TE[:, :1]))
    length = losses.sum_over_ranks(length)
    probability = zeros.index_add(0, losses.sequence_T, normalized_TE) / length
    if losses.load_before is None:
        frequency = losses.sum_over_ranks(zeros.index_add(0, losses.sequence_T, chosen_TE)) * (E / A) / length
    else:
        before_E = losses.load_before.get(layer, torch.zeros_like(chosen_TE[0]))
        load_E = losses.sum_over_batch(chosen_TE.sum(dim=0) + before_E)
        frequency = load_E * (E / load_E.sum())
    return (frequency * probability).sum(dim=-1).mean()


def z_loss(x_TD: torch.Tensor, weight_ED: torch.Tensor, losses: RouterLoss) -> torch.Tensor:
    """Return the mean square of the log-sum-exp of the logits (arXiv 2202.08906, equation 5), which bounds them.

    If several processes hold tokens of a sequence, the sum of their results is the loss.
    """
    logits_TE = nn.functional.linear(x_TD.float(), weight_ED.float())
    tokens = losses.sum_over_ranks(logits_TE.new_tensor(float(len(logits_TE))))
    return logits_TE.logsumexp(dim=-1).square().sum() / tokens


class _AddLoss(torch.autograd.Function):
    """Returns a tensor unchanged, and gives `loss` a gradient of 1 independent of the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss_dtype = loss.dtype
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, torch.ones((), dtype=ctx.loss_dtype, device=gradient.device)
