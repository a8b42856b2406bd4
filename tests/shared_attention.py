"""The modules of `attention_kinds`."""

import torch
from torch import nn

from openmimo.kernels.operations import apply_rotary
from openmimo.model.attention import AttentionPlace
from openmimo.model.context import AttentionCall, AttentionContext
from openmimo.model.layers import Linear


class SharedAttention(nn.Module):
    """Queries of its own over the keys and values of layer `spec.kv_from`."""

    def __init__(self, place: AttentionPlace):
        super().__init__()
        self.spec, self.index = place.spec, place.index
        self.q_proj = Linear(place.hidden_size, place.spec.num_heads * place.spec.key_dim, bias=place.bias)
        self.o_proj = Linear(place.spec.num_heads * place.spec.value_dim, place.hidden_size, bias=False)
        self.attention_sink_bias = nn.Parameter(torch.zeros(place.spec.num_heads)) if place.spec.sink else None

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        spec = self.spec
        q_TNK = self.q_proj(x_TD).view(len(x_TD), spec.num_heads, spec.key_dim)
        q_TNK = apply_rotary(q_TNK, *context.rotary(spec, x_TD.dtype))
        sink_N, window_keys = self.attention_sink_bias, spec.window_keys
        call = AttentionCall(self.index, q_TNK, None, None, sink_N, window_keys, source_layer=spec.kv_from)
        return self.o_proj(self.weighted(context.attend(call).out_TNV, context).flatten(1))

    def weighted(self, out_TNV: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        return out_TNV


class ScoredAttention(SharedAttention):
    """Multiplies the output of each group of heads by (largest block score of the source + sum of its block scores)."""

    def weighted(self, out_TNV: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        scores_TGC = context.block_scores[self.spec.kv_from]
        factor_TG = scores_TGC.amax(2) + scores_TGC.sum(2)
        return out_TNV * factor_TG.repeat_interleave(self.spec.num_heads // self.spec.num_kv_heads, 1)[..., None]
