"""The decoder stack that text and other models share: embedded inputs in, hidden states out.

T packed tokens, D model dim.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from openmimo.model.attention import build_attention
from openmimo.model.config import LayerConfig, ModelConfig
from openmimo.model.context import AttentionContext
from openmimo.model.layers import DenseFFN, RMSNorm
from openmimo.model.moe import MoE, Router


class Hidden(NamedTuple):
    """States of a pass, [T, D] each.

    A named tuple, because wrappers of modules (FSDP) look for tensors in tuples and dicts.

    Attributes:
        pre_norm_TD: The residual stream before the final norm.
        post_norm_TD: After it; the main head reads this.
        mtp_TD: By MTP head that was asked for, its states, ready for the output head.
    """

    pre_norm_TD: torch.Tensor
    post_norm_TD: torch.Tensor
    mtp_TD: dict[int, torch.Tensor] = {}


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    Args:
        config: The whole model.
        layer: This layer.
        index: Its number in the whole model, under which contexts keep its keys and routes.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, index: int):
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.self_attn = build_attention(config.attention_place(index))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.is_sparse = layer.ffn == "moe"
        self.mlp = (
            MoE(config.hidden_size, config.moe, index)
            if self.is_sparse
            else DenseFFN(config.hidden_size, config.dense_ffn_dim)
        )

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """[T, D] to [T, D]."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), context)
        y_TD = self.post_attention_layernorm(x_TD)
        return x_TD + (self.mlp(y_TD, context) if self.is_sparse else self.mlp(y_TD))


class LayerStack(nn.Module):
    """Decoder layers in order, by their index in the whole model; a pipeline stage has some of them."""

    def __init__(self, layers: Iterable[DecoderLayer]):
        super().__init__()
        for layer in layers:
            self.add_module(str(layer.index), layer)

    def __getitem__(self, index: int) -> DecoderLayer:
        return self._modules[str(index)]

    def __iter__(self) -> Iterator[DecoderLayer]:
        return iter(self._modules.values())

    def __len__(self) -> int:
        return len(self._modules)

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """[T, D] to [T, D] through all layers."""
        for layer in self:
            x_TD = layer(x_TD, context)
        return x_TD


class Backbone(nn.Module):
    """Decoder layers and the final norm.

    Args:
        config: The whole model.
        layers: Indices of the layers to build (None: all).
        embed_tokens: The embedding of a text model. Checkpoints name it under the backbone; `forward` does not call it.
    """

    def __init__(
        self, config: ModelConfig, layers: Iterable[int] | None = None, *, embed_tokens: nn.Module | None = None
    ):
        super().__init__()
        indices = range(len(config.layers)) if layers is None else layers
        if embed_tokens is not None:
            self.embed_tokens = embed_tokens
        self.layers = LayerStack(DecoderLayer(config, config.layers[index], index) for index in indices)
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> Hidden:
        """Embedded inputs [T, D] to hidden states."""
        x_TD = self.layers(x_TD, context)
        return Hidden(pre_norm_TD=x_TD, post_norm_TD=self.norm(x_TD))

    def routers(self) -> dict[int, Router]:
        """The routers by layer index."""
        return {layer.index: layer.mlp.gate for layer in self.layers if layer.is_sparse}
