"""Activation checkpointing: layers that compute their activations again in the backward pass instead of keeping them.

It is applied to a built model, before weights are sharded, so that the hooks of a wrapper run outside the recomputed
region. T packed tokens, D model dim.
"""

import torch
from torch.utils.checkpoint import checkpoint

from openmimo.model.backbone import DecoderLayer
from openmimo.model.context import AttentionContext
from openmimo.model.mimo import MiMo


class RecomputedLayer(DecoderLayer):
    """A decoder layer that keeps its input only."""

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """As `DecoderLayer.forward`."""
        if not torch.is_grad_enabled():
            return super().forward(x_TD, context)
        return checkpoint(super().forward, x_TD, context, use_reentrant=False)


def checkpoint_activations(model: MiMo) -> None:
    """Makes every decoder layer of `model` recompute its activations; names of parameters stay as they are."""
    for layer in model.model.layers:
        if type(layer) is DecoderLayer:
            layer.__class__ = RecomputedLayer
