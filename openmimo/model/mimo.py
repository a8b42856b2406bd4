"""The MiMo model: one definition for training, scoring and serving, on packed tokens [T] without a batch axis.

T packed tokens, D model dim.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from openmimo.core.errors import UserError
from openmimo.data.tokenizer_files import Companions
from openmimo.model.attention import AttentionModule, RopeScaling
from openmimo.model.backbone import Backbone, Hidden
from openmimo.model.config import ModelConfig
from openmimo.model.context import AttentionContext, PackedContext
from openmimo.model.heads import MTP, Head, MicroBatch
from openmimo.model.layers import Embedding, RMSNorm
from openmimo.model.moe import Experts, Router

Draw = Callable[[torch.Tensor, float, torch.Generator], object]


def _draw(weight: torch.Tensor, std: float, generator: torch.Generator) -> object:
    return weight.normal_(std=std, generator=generator)


class MiMo(nn.Module):
    """Embedding, backbone, MTP blocks and output head.

    The parameters are created on the current default device and most are uninitialized. Load a checkpoint, or call
    `initialize` to train from scratch.

    Attributes:
        config: The geometry of the model. `extend_context` and `replicate_mtp_heads` replace it.
        compute_dtype: Dtype of the activations (None: that of the parameters).
        companions: Tokenizer files of the folder from which the model was loaded; they are saved with it.
        is_extended: Whether `extend_context` has given the model more positions than that folder states.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.companions = Companions()
        self.is_extended = False
        self.model = Backbone(config, embed_tokens=Embedding(config.vocab_size, config.hidden_size))
        self.model.mtp = MTP(config)  # below the backbone, as in published checkpoints
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.tie_weights()

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.model.embed_tokens.device

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.compute_dtype or self.model.embed_tokens.dtype

    @property
    def head(self) -> Head:
        """The output head: `model.head(states_TD)` gives logits."""
        return self.lm_head

    def config_keys(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of `config.json`, given those of `config`. A subclass adds its own."""
        return values

    def tie_weights(self) -> None:
        """Share the embedding's weight with the head if the config ties them; call it again after `to_empty`."""
        if self.config.tie_embeddings:
            self.lm_head.tie(self.model.embed_tokens)

    def forward(
        self,
        tokens_T: torch.Tensor | None,
        context: AttentionContext,
        shifted_tokens: Mapping[int, torch.Tensor] | None = None,
        *,
        hidden: Hidden | None = None,
    ) -> Hidden:
        """Run the main model, MTP blocks, or both. Logits are `head(hidden.post_norm_TD)`.

        Args:
            tokens_T: Packed token ids, int64 [T]; None if `hidden` is given.
            context: Positions, attention and routing of the pass.
            shifted_tokens: For each MTP head to run, its input tokens, int64 [T]: entry i is token i+1+head of the
                sequence of row i. Row i of the head's states predicts the token after it.
            hidden: States of an earlier pass, for the MTP blocks; the main model then does not run.
        """
        assert (tokens_T is None) != (hidden is None)
        if hidden is None:
            hidden = self.model(self.model.embed_tokens(tokens_T, self.compute_dtype), context)
        if not shifted_tokens:
            return hidden
        assert self.config.mtp is not None, "the model has no MTP heads"
        hidden_TD = hidden.pre_norm_TD if self.config.mtp.hidden == "pre_norm" else hidden.post_norm_TD
        mtp_TD = {
            head: self.model.mtp(
                head, self.model.embed_tokens(shifted_tokens_T, self.compute_dtype), hidden_TD, context
            )
            for head, shifted_tokens_T in shifted_tokens.items()
        }
        return hidden._replace(mtp_TD=mtp_TD)

    def head_states(self, batch: MicroBatch, context: AttentionContext) -> list[torch.Tensor]:
        """Return the final states [T, D] of every head from one pass, the main head first."""
        hidden = self(batch.tokens_T, context, dict(enumerate(batch.shifted)))
        return [hidden.post_norm_TD, *hidden.mtp_TD.values()]

    def mtp(self, head: int, hidden: Hidden, shifted_tokens_T: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Return the states [T, D] of one MTP head for the rows of `hidden`; see `forward`."""
        return self(None, context, {head: shifted_tokens_T}, hidden=hidden).mtp_TD[head]

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Map one causal sequence, LongTensor [T], to float32 logits [T, vocab].

        Raises:
            UserError: `token_ids` is not an integer tensor of one dimension, is empty, or has an unknown id.
        """
        self._check_ids(token_ids)
        context = PackedContext((len(token_ids),), device=self.device)
        return self.head(self(token_ids.to(self.device), context).post_norm_TD)

    def _check_ids(self, token_ids: torch.Tensor) -> None:
        if not isinstance(token_ids, torch.Tensor) or token_ids.dtype not in (torch.int64, torch.int32):
            type_name = token_ids.dtype if isinstance(token_ids, torch.Tensor) else type(token_ids).__name__
            raise UserError(f"token_ids is of type {type_name}; give a LongTensor of one dimension.")
        if token_ids.ndim != 1 or not len(token_ids):
            raise UserError(f"token_ids has the shape {list(token_ids.shape)}; give one dimension, not empty.")
        low, high = token_ids.min().item(), token_ids.max().item()
        if low < 0 or high >= self.config.vocab_size:
            outside = low if low < 0 else high
            raise UserError(f"token_ids holds id {outside}, but the model's ids are 0 to {self.config.vocab_size - 1}.")

    def extend_context(
        self, *, full_rope_theta: float | None, max_positions: int, full_rope_scaling: RopeScaling | None = None
    ) -> None:
        """Extend the context (paper section 3.1): change the RoPE base of the full-attention layers, add positions.

        Args:
            full_rope_theta: New RoPE base of the full-attention layers (None: unchanged). Sliding layers keep theirs.
            max_positions: New maximum length. A smaller value than the current one has no effect.
            full_rope_scaling: New scaling of RoPE in the full-attention layers (None: unchanged).
        """
        self.is_extended = self.is_extended or max_positions > self.config.max_positions
        self.config = replace(self.config, max_positions=max(max_positions, self.config.max_positions))
        if full_rope_theta is None and full_rope_scaling is None:
            return
        self.config = self.config.with_full_rope(full_rope_theta, full_rope_scaling)
        for layer in self.model.layers:
            cast(AttentionModule, layer.self_attn).spec = self.config.layers[layer.index].attention
        for block in self.model.mtp.layers:
            assert self.config.mtp is not None
            cast(AttentionModule, block.self_attn).spec = self.config.mtp.attention

    def replicate_mtp_heads(self, num_heads: int) -> None:
        """Add copies of the last MTP head until there are `num_heads` (post-training, paper section 2.3)."""
        self.model.mtp.replicate_last(num_heads, self.config)
        self.config = self.config.with_mtp_heads(len(self.model.mtp.layers))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator, *, draw: Draw | None = None) -> None:
        """Draw weights from N(0, init_std) (paper section 3.1); set norms to one, biases and sinks to zero.

        Args:
            generator: The source of all numbers.
            draw: Fills a weight from N(0, std), given std and generator (None: `normal_`).
        """
        draw, std = draw or _draw, self.config.init_std
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
            if isinstance(module, (nn.Linear, nn.Embedding, Router)):
                draw(module.weight, std, generator)
            if isinstance(module, Experts):
                draw(module.gate_up_proj, std, generator)
                draw(module.down_proj, std, generator)
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            if isinstance(module, Router):
                module.e_score_correction_bias.zero_()

    def routers(self) -> dict[int, Router]:
        """Return the routers by layer index."""
        return self.model.routers()
