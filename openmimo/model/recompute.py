"""Activation checkpointing: decoder layers that recompute their activations in the backward pass.

Apply it to a built model before its weights are sharded, so that the hooks of a wrapper run outside the recomputed
region. T packed tokens, D model dim.
"""

import torch
from torch.utils.checkpoint import checkpoint

from openmimo.model.backbone import DecoderLayer
from openmimo.model.context import AttentionContext
from openmimo.model.mimo import MiMo


class RecomputedLayer(DecoderLayer):
    """A decoder layer that saves only its input for the backward pass."""

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """As `DecoderLayer.forward`."""
        if not torch.is_grad_enabled():
            return super().forward(x_TD, context)
        return checkpoint(super().forward, x_TD, context, use_reentrant=False)


def checkpoint_activations(model: MiMo) -> None:
    """Make every decoder layer of `model` recompute its activations; parameter names do not change."""
    for layer in model.model.layers:
        if type(layer) is DecoderLayer:
            layer.__class__ = RecomputedLayer
