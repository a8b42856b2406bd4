"""Multi-token prediction heads (paper section 2.3), for the training loss and for drafting.

T packed tokens, D model dim.

Head k at position i reads the embedding of token i+1+k and the main model's hidden state at i, and predicts token
i+2+k. Heads are not chained: each reads the main model's state, never another head's. They share the embedding and the
output head of the main model:

    tokens            t0    t1    t2    t3
    main, at 0        state of t0                        predicts t1
    head 0, at 0      state of t0, embedding of t1       predicts t2
    head 1, at 0      state of t0, embedding of t2       predicts t3
"""

import torch
from torch import nn

from openmimo.model.attention import build_attention
from openmimo.model.config import ModelConfig
from openmimo.model.context import AttentionContext
from openmimo.model.layers import DenseFFN, Linear, RMSNorm


class MTPBlock(nn.Module):
    """One head: norms of both inputs, their projection, an attention layer, a dense FFN, and a final norm.

    Args:
        config: The whole model.
        index: Layer index under which contexts store this block's keys; head h is layer `len(config.layers) + h`.
    """

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        D, epsilon = config.hidden_size, config.norm_epsilon
        self.enorm = RMSNorm(D, epsilon)
        self.hnorm = RMSNorm(D, epsilon)
        self.eh_proj = Linear(2 * D, D, bias=False)
        self.input_layernorm = RMSNorm(D, epsilon)
        self.self_attn = build_attention(config.attention_place(index))
        self.pre_mlp_layernorm = RMSNorm(D, epsilon)
        self.mlp = DenseFFN(D, config.dense_ffn_dim)
        self.final_layernorm = RMSNorm(D, epsilon)

    def forward(self, embedding_TD: torch.Tensor, hidden_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Map embeddings of shifted tokens and main-model states, both [T, D], to inputs of the output head [T, D]."""
        x_TD = self.eh_proj(torch.cat([self.enorm(embedding_TD), self.hnorm(hidden_TD)], dim=-1))
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), context)
        x_TD = x_TD + self.mlp(self.pre_mlp_layernorm(x_TD))
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
        """States [T, D] of block `head`; arguments as in `MTPBlock`."""
        return self.layers[head](embedding_TD, hidden_TD, context)

    def replicate_last(self, num_heads: int, config: ModelConfig) -> None:
        """Grow to `num_heads` blocks, each new one a copy of the last."""
        while len(self.layers) < num_heads:
            last = self.layers[-1]
            parameter = next(last.parameters())
            block = MTPBlock(config, len(config.layers) + len(self.layers)).to(parameter.device, parameter.dtype)
            block.load_state_dict(last.state_dict())
            self.layers.append(block)


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
