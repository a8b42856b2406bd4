"""The MiMo model: one definition for training, scoring and serving, on packed tokens [T] and with no batch axis.

T packed tokens, D model dim.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from openmimo.core.errors import UserError
from openmimo.data.companions import Companions
from openmimo.model.attention import build_attention
from openmimo.model.config import LayerConfig, ModelConfig
from openmimo.model.context import AttentionContext, PackedContext
from openmimo.model.layers import DenseFFN, Linear, RMSNorm
from openmimo.model.moe import Experts, MoE, Router
from openmimo.model.mtp import MTPBlock


@dataclass(frozen=True)
class Hidden:
    """States of the main model, [T, D] each: the residual stream before the final norm, and after it."""

    pre_norm_TD: torch.Tensor
    post_norm_TD: torch.Tensor


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, index: int):
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.self_attn = build_attention(config.attention_place(index))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.is_sparse = layer.ffn == "moe"
        self.mlp = (
            MoE(config.hidden_size, config.moe)
            if self.is_sparse
            else DenseFFN(config.hidden_size, config.dense_ffn_dim)
        )

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """[T, D] to [T, D]."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), context)
        y_TD = self.post_attention_layernorm(x_TD)
        return x_TD + (self.mlp(y_TD, context, self.index) if self.is_sparse else self.mlp(y_TD))


class MiMo(nn.Module):
    """The model with its MTP heads.

    The parameters are created on the current default device and left uninitialized where a checkpoint will fill them;
    call `initialize` for a model to train from nothing. compute_dtype: dtype of the activations (the parameters' own by
    default). activation_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
    companions: the tokenizer's files of the folder that the model was loaded from; they are saved with it. is_extended:
    `extend_context` has given it more positions than that folder says.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.activation_checkpointing = False
        self.companions = Companions()
        self.is_extended = False
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(
            DecoderLayer(config, layer, index) for index, layer in enumerate(config.layers)
        )
        self.model.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.model.mtp = nn.Module()
        self.model.mtp.layers = nn.ModuleList(MTPBlock(config, head) for head in range(config.num_mtp_heads))
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.embed_tokens.weight.device

    def embed(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """Token ids [T] to embeddings [T, D] in the dtype of the activations."""
        weight = self.model.embed_tokens.weight
        return F.embedding(tokens_T, weight).to(self.compute_dtype or weight.dtype)

    def forward(self, tokens_T: torch.Tensor, context: AttentionContext) -> Hidden:
        """Packed token ids, int64 [T], to hidden states. Logits are `head(hidden.post_norm_TD)`."""
        x_TD = self.embed(tokens_T)
        for layer in self.model.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_TD = checkpoint(layer, x_TD, context, use_reentrant=False)
            else:
                x_TD = layer(x_TD, context)
        return Hidden(pre_norm_TD=x_TD, post_norm_TD=self.model.norm(x_TD))

    def mtp(self, head: int, hidden: Hidden, shifted_tokens_T: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """States [T, D] of MTP head `head`, ready for `head()`: row i predicts the token after `shifted_tokens_T[i]`.

        `shifted_tokens_T[i]` is token i+1+head of the sequence; the rows are at the same positions as `hidden`.
        """
        hidden_TD = hidden.pre_norm_TD if self.config.mtp.hidden == "pre_norm" else hidden.post_norm_TD
        return self.model.mtp.layers[head](self.embed(shifted_tokens_T), hidden_TD, context)

    def head(self, states_TD: torch.Tensor) -> torch.Tensor:
        """States [T, D] to float32 logits [T, vocab] (float64 stays). For a loss, use `kernels.token_loss` instead."""
        logits = self.lm_head(states_TD)
        return logits if logits.dtype == torch.float64 else logits.float()

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """One causal sequence, LongTensor [T], to float32 logits [T, vocab]. Raises UserError for another tensor."""
        self._check_ids(token_ids)
        context = PackedContext((len(token_ids),), device=self.device)
        return self.head(self(token_ids.to(self.device), context).post_norm_TD)

    def _check_ids(self, token_ids: torch.Tensor) -> None:
        if not isinstance(token_ids, torch.Tensor) or token_ids.dtype not in (torch.int64, torch.int32):
            given = token_ids.dtype if isinstance(token_ids, torch.Tensor) else type(token_ids).__name__
            raise UserError(f"token_ids is of type {given}; give a LongTensor of one dimension.")
        if token_ids.ndim != 1 or not len(token_ids):
            raise UserError(f"token_ids has the shape {list(token_ids.shape)}; give one dimension, not empty.")
        low, high = token_ids.min().item(), token_ids.max().item()
        if low < 0 or high >= self.config.vocab_size:
            outside = low if low < 0 else high
            raise UserError(f"token_ids holds id {outside}, but the model's ids are 0 to {self.config.vocab_size - 1}.")

    def extend_context(self, *, full_rope_theta: float | None, max_positions: int) -> None:
        """Gives the full-attention layers another RoPE base (None: the same) and the model more positions.

        Context extension, paper section 3.1; sliding layers keep their base.
        """
        self.is_extended = self.is_extended or max_positions > self.config.max_positions
        self.config = replace(self.config, max_positions=max(max_positions, self.config.max_positions))
        if full_rope_theta is None:
            return
        self.config = self.config.with_full_rope_theta(full_rope_theta)
        for layer, layer_config in zip(self.model.layers, self.config.layers, strict=True):
            layer.self_attn.spec = layer_config.attention
        for block in self.model.mtp.layers:
            block.self_attn.spec = self.config.mtp.attention

    def replicate_mtp_heads(self, num_heads: int) -> None:
        """Grows to `num_heads` MTP heads, each new one a copy of the last (post-training, paper section 2.3)."""
        while len(self.model.mtp.layers) < num_heads:
            block = MTPBlock(self.config, len(self.model.mtp.layers)).to(self.device, self.model.norm.weight.dtype)
            block.load_state_dict(self.model.mtp.layers[-1].state_dict())
            self.model.mtp.layers.append(block)
        self.config = self.config.with_mtp_heads(len(self.model.mtp.layers))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Weights from N(0, init_std) (paper section 3.1), norms at one, all else (biases, sinks) at zero."""
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
            if isinstance(module, (nn.Linear, nn.Embedding, Router)):
                module.weight.normal_(std=self.config.init_std, generator=generator)
            if isinstance(module, Experts):
                module.gate_up_proj.normal_(std=self.config.init_std, generator=generator)
                module.down_proj.normal_(std=self.config.init_std, generator=generator)
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            if isinstance(module, Router):
                module.e_score_correction_bias.zero_()

    def routers(self) -> dict[int, Router]:
        """The routers by layer number."""
        return {index: layer.mlp.gate for index, layer in enumerate(self.model.layers) if layer.is_sparse}
