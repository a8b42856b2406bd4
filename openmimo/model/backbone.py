"""The decoder stack, from embedded inputs to hidden states, for text models and others; and activation checkpointing.

T packed tokens, D model dim.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn

from openmimo.core.registry import load_object
from openmimo.model.config import ActivationConfig, LayerConfig, ModelConfig
from openmimo.model.context import AttentionContext
from openmimo.model.layers import Embedding, parts_of
from openmimo.model.moe import MoE, Router

if TYPE_CHECKING:
    from openmimo.model.heads import MTP


class Hidden(NamedTuple):
    """States of a pass, [T, D] each.

    It is a named tuple because module wrappers (FSDP) look for tensors in tuples and dicts.

    Attributes:
        pre_norm_TD: The residual stream before the final norm.
        post_norm_TD: The residual stream after the final norm, the input of the output head.
        mtp_TD: States of each requested MTP head, also inputs of the output head.
    """

    pre_norm_TD: torch.Tensor
    post_norm_TD: torch.Tensor
    mtp_TD: dict[int, torch.Tensor] = {}


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    Args:
        config: The whole model.
        layer: This layer.
        index: Index of the layer in the whole model. Contexts store its keys and routes under this index.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, index: int):
        super().__init__()
        self.index = index
        parts = parts_of(config)
        self.input_layernorm = parts.norm(config.hidden_size, config.norm_epsilon)
        self.self_attn = parts.attention(config.attention_place(index))
        self.post_attention_layernorm = parts.residual_norm(config.hidden_size, config.norm_epsilon)
        self.is_sparse = layer.ffn == "moe"
        if self.is_sparse:
            assert config.moe is not None, "checked by the config"
            self.mlp: nn.Module = parts.moe(config.hidden_size, config.moe, index)
        else:
            self.mlp = parts.ffn(config.hidden_size, config.dense_ffn_dim)

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Map [T, D] to [T, D]."""
        x_TD, y_TD = self.post_attention_layernorm(x_TD, self.self_attn(self.input_layernorm(x_TD), context))
        return x_TD + (self.mlp(y_TD, context) if self.is_sparse else self.mlp(y_TD))


class LayerStack(nn.Module):
    """Decoder layers in order, keyed by their index in the whole model; a pipeline stage has a subset of them."""

    def __init__(self, layers: Iterable[DecoderLayer]):
        super().__init__()
        for layer in layers:
            self.add_module(str(layer.index), layer)

    def __getitem__(self, index: int) -> DecoderLayer:
        return cast(DecoderLayer, self._modules[str(index)])

    def __iter__(self) -> Iterator[DecoderLayer]:
        return iter(cast(Iterable[DecoderLayer], self._modules.values()))

    def __len__(self) -> int:
        return len(self._modules)

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Apply all layers, [T, D] to [T, D]."""
        for layer in self:
            x_TD = layer(x_TD, context)
        return x_TD


class Backbone(nn.Module):
    """Decoder layers and the final norm.

    `embed_tokens` and `mtp` are attributes of text models only. They are here because published checkpoints name them
    under the backbone; `forward` does not call them.

    Args:
        config: The whole model.
        layers: Indices of the layers to build (None: all).
        embed_tokens: The embedding of a text model.
    """

    embed_tokens: Embedding
    mtp: "MTP"

    def __init__(
        self, config: ModelConfig, layers: Iterable[int] | None = None, *, embed_tokens: Embedding | None = None
    ):
        super().__init__()
        indices = range(len(config.layers)) if layers is None else layers
        if embed_tokens is not None:
            self.embed_tokens = embed_tokens
        self.layers = LayerStack(DecoderLayer(config, config.layers[index], index) for index in indices)
        self.norm = parts_of(config).norm(config.hidden_size, config.norm_epsilon)

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> Hidden:
        """Map embedded inputs [T, D] to hidden states."""
        x_TD = self.layers(x_TD, context)
        return Hidden(pre_norm_TD=x_TD, post_norm_TD=self.norm(x_TD))

    def routers(self) -> dict[int, Router]:
        """Return the routers by layer index."""
        return {layer.index: cast(MoE, layer.mlp).gate for layer in self.layers if layer.is_sparse}


def checkpoint_activations(
    backbone: nn.Module, config: ActivationConfig | None = None, *, recompute: bool = True
) -> None:
    """Make decoder layers and MTP blocks keep less for the backward pass; parameter names do not change.

    Apply it to a built model before its weights are sharded, so that the hooks of a wrapper run outside the recomputed
    region.

    Args:
        backbone: The backbone of a text model or of another.
        config: What is recomputed, divided and offloaded (None: whole layers are recomputed).
        recompute: Whether anything is recomputed. Otherwise only the other settings apply.
    """
    config = config or ActivationConfig()
    if recompute or config != ActivationConfig():
        load_object("openmimo.model.activations:keep_activations")(backbone, config, recompute=recompute)
