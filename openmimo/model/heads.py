"""The output head, the multi-token prediction (MTP) heads of paper section 2.3, and the training labels of all heads.

The output head maps states to logits, or to log-probabilities and losses without a [T, vocabulary] tensor. All code
that needs its weight calls the module, so that hooks, parametrizations and sharded weights take effect.

MTP head k at position i reads the embedding of token i+1+k and the main model's hidden state at i, and predicts token
i+2+k. Heads are not chained: each reads the main model's state, never another head's. They share the embedding and the
output head of the main model:

    tokens            t0    t1    t2    t3
    main, at 0        state of t0                        predicts t1
    head 0, at 0      state of t0, embedding of t1       predicts t2
    head 1, at 0      state of t0, embedding of t2       predicts t3

T packed tokens, D model dim, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from openmimo.kernels.operations import (
    IGNORED_LABEL,
    joined_token_loss,
    joins_heads,
    token_argmax,
    token_logprobs,
    token_loss,
)
from openmimo.model.config import ModelConfig
from openmimo.model.context import AttentionContext
from openmimo.model.layers import Embedding, Linear, parts_of
from openmimo.model.weight_formats import copy_training
from openmimo.runtime.device import uploaded

Reader = Callable[[torch.Tensor, torch.Tensor], Any]


class Head(Linear):
    """Linear layer from states to the vocabulary. Its weight is always plain."""

    quantizable = MappingProxyType({})

    def __init__(self, model_dim: int, vocab_size: int):
        super().__init__(model_dim, vocab_size, bias=False)

    def forward(self, states_TD: torch.Tensor, reader: Reader | None = None, *, as_held: bool = False) -> Any:
        """Return logits [T, V] in float32 (float64 for float64 states), or the result of `reader`.

        Args:
            states_TD: Final hidden states.
            reader: Called with the states and the weight in their dtype, instead of computing logits.
            as_held: Whether the reader gets the weight in its own dtype.
        """
        if reader is not None:
            weight_VD = self.weight if as_held else self.weight_as("weight", states_TD.dtype)
            assert isinstance(weight_VD, torch.Tensor)
            return reader(states_TD, weight_VD)
        logits_TV = super().forward(states_TD)
        return logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()

    def logprobs(
        self, states_TD: torch.Tensor, labels_T: torch.Tensor, temperature: float | torch.Tensor = 1.0
    ) -> torch.Tensor:
        """Return log p(label) at a temperature, [T], float32 or float64; see `kernels.operations.token_logprobs`."""
        return self(states_TD, functools.partial(_logprobs, labels_T=labels_T, temperature=temperature))

    def loss(
        self, states_TD: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor, *, num_kept: int | None = None
    ) -> torch.Tensor:
        """Return -sum of weights_T * log p(label), a scalar; see `kernels.operations.token_loss`."""
        return self(states_TD, functools.partial(token_loss, labels_T=labels_T, weights_T=weights_T, num_kept=num_kept))

    def joins(self, states_TD: torch.Tensor) -> bool:
        """Return whether `joined_loss` can be called with these states."""
        return joins_heads(states_TD)

    def joined_loss(
        self, states_TD: torch.Tensor, labels_T: torch.Tensor, weights_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of the rows of several heads, and log-probabilities; see `operations.joined_token_loss`."""
        return self(
            states_TD, functools.partial(joined_token_loss, labels_T=labels_T, weights_T=weights_T), as_held=True
        )

    def argmax(self, states_TD: torch.Tensor) -> torch.Tensor:
        """Return the most probable token of each row, int64 [T]."""
        return self(states_TD, token_argmax)

    def tie(self, embedding: Embedding) -> None:
        """Share the embedding's weight."""
        self.weight = embedding.weight


def _logprobs(
    states_TD: torch.Tensor, weight_VD: torch.Tensor, *, labels_T: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    return token_logprobs(states_TD, weight_VD, labels_T, temperature=temperature)


class MTPBlock(nn.Module):
    """One head: norms of both inputs, their projection, an attention layer, a dense FFN, and a final norm.

    Args:
        config: The whole model.
        index: Layer index under which contexts store this block's keys; head h is layer `len(config.layers) + h`.
    """

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        D, epsilon, parts = config.hidden_size, config.norm_epsilon, parts_of(config)
        self.enorm = parts.norm(D, epsilon)
        self.hnorm = parts.norm(D, epsilon)
        self.eh_proj = parts.merge(D)
        self.input_layernorm = parts.norm(D, epsilon)
        self.self_attn = parts.attention(config.attention_place(index))
        self.pre_mlp_layernorm = parts.residual_norm(D, epsilon)
        self.mlp = parts.ffn(D, config.dense_ffn_dim)
        self.final_layernorm = parts.norm(D, epsilon)

    def forward(self, embedding_TD: torch.Tensor, hidden_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Map embeddings of shifted tokens and main-model states, both [T, D], to inputs of the output head [T, D]."""
        x_TD = self.eh_proj(torch.cat([self.enorm(embedding_TD), self.hnorm(hidden_TD)], dim=-1))
        x_TD, y_TD = self.pre_mlp_layernorm(x_TD, self.self_attn(self.input_layernorm(x_TD), context))
        x_TD = x_TD + self.mlp(y_TD)
        return self.final_layernorm(x_TD)


class MTP(nn.Module):
    """The MTP blocks of a model, indexed by head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        first = len(config.layers)
        self.layers = nn.ModuleList(MTPBlock(config, first + head) for head in range(config.num_mtp_heads))

    def forward(
        self, head: int, embedding_TD: torch.Tensor, hidden_TD: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Return the states [T, D] of block `head`. The other arguments are those of `MTPBlock`."""
        return self.layers[head](embedding_TD, hidden_TD, context)

    def replicate_last(self, num_heads: int, config: ModelConfig) -> None:
        """Add copies of the last block until there are `num_heads` blocks."""
        while len(self.layers) < num_heads:
            last = self.layers[-1]
            parameter = next(last.parameters())
            block = MTPBlock(config, len(config.layers) + len(self.layers)).to(parameter.device, parameter.dtype)
            block.load_state_dict(last.state_dict())
            copy_training(last, block)
            self.layers.append(block)


@dataclass(frozen=True)
class MicroBatch:
    """Packed tokens on the device with the labels of every head.

    Attributes:
        tokens_T: Packed token ids.
        document_lengths: Lengths of the documents.
        labels: int64 [T] per head, the main head first, then the MTP heads; -1 where there is nothing to predict.
        shifted: Input tokens of each MTP head, int64 [T]; see `MiMo.forward`.
        num_labels: Number of labels of each head if the host knows it, else None.
    """

    tokens_T: torch.Tensor
    document_lengths: tuple[int, ...]
    labels: tuple[torch.Tensor, ...]
    shifted: tuple[torch.Tensor, ...]
    num_labels: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """Return this micro-batch of the host on `device`."""
        tokens_T, *rest = (uploaded(item, item.dtype, device) for item in (self.tokens_T, *self.labels, *self.shifted))
        heads = len(self.labels)
        return replace(self, tokens_T=tokens_T, labels=tuple(rest[:heads]), shifted=tuple(rest[heads:]))

    def label_counts(self) -> torch.Tensor:
        """Return the number of labels of each head, int64 [heads]."""
        return torch.stack([(labels_T != IGNORED_LABEL).sum() for labels_T in self.labels])


def micro_batch(
    tokens_T: torch.Tensor, document_lengths: tuple[int, ...], loss_mask_T: torch.Tensor | None, num_mtp_heads: int
) -> MicroBatch:
    """Label packed tokens: head k (0 is the main head) predicts the token k+1 positions later in the same document.

    Args:
        tokens_T: Packed token ids.
        document_lengths: Lengths of the documents.
        loss_mask_T: bool [T], whether a token counts as a label (None: all do).
        num_mtp_heads: Number of MTP heads.
    """
    label_tokens_T = tokens_T if loss_mask_T is None else torch.where(loss_mask_T, tokens_T, IGNORED_LABEL)
    labels = tuple(
        shift_within_documents(label_tokens_T, document_lengths, by=1 + head, fill=IGNORED_LABEL)
        for head in range(1 + num_mtp_heads)
    )
    shifted = tuple(
        shift_within_documents(tokens_T, document_lengths, by=1 + head, fill=0) for head in range(num_mtp_heads)
    )
    batch = MicroBatch(tokens_T, document_lengths, labels, shifted)
    return replace(batch, num_labels=tuple(batch.label_counts().tolist())) if tokens_T.is_cpu else batch


def shift_within_documents(
    tokens_T: torch.Tensor, document_lengths: tuple[int, ...], by: int, fill: int
) -> torch.Tensor:
    """Shift packed tokens left by `by`: entry i is token i+by, or `fill` if that is not in the same document."""
    T = len(tokens_T)
    lengths = torch.tensor(document_lengths)
    end_T = torch.repeat_interleave(torch.cumsum(lengths, 0), lengths).to(tokens_T.device)
    source_T = torch.arange(T, device=tokens_T.device) + by
    shifted_T = tokens_T[source_T.clamp(max=T - 1)]
    return torch.where(source_T < end_T, shifted_T, fill)
