"""The complex-valued layers of Fairy+-i (arXiv 2508.05571), as real computations of stacked weights.

A state of D real numbers is [real parts | imaginary parts] of D / 2 complex ones. In this layout, most of the model is
the real one, unchanged:

    embedding    two tables side by side are one table [V, D]
    rotation     z e^(i t theta_j), theta_j = base^(-2j / K), is RoPE over all K dims of a head [re | im]
    attention    Re<q, k> = q_re k_re + q_im k_im is the real product of heads [re | im] of K dims
    norm         sqrt(mean |z|^2) is sqrt(2) times the root mean square of the D numbers; one gain for each number
    output head  a real linear layer from D

A linear layer has the weight [2N, D / 2], rows of real parts first, and computes W conj(x) as the released models do
(or W x). Both parts of x are rows of one real product, so that the weight is read once, in any weight format.

T packed tokens, D model dim, N query heads, G key/value heads, K key dim, V value dim, E experts, F FFN hidden dim. All
dims count real numbers.
"""

import math
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from openmimo.kernels.operations import apply_rotary, linear, rms_norm
from openmimo.kernels.weights import unbind
from openmimo.model.attention import AttentionPlace
from openmimo.model.config import ComplexConfig, ModelConfig, MoEConfig
from openmimo.model.context import AttentionCall, AttentionContext
from openmimo.model.layers import Linear, Parts, RMSNorm
from openmimo.model.moe import Experts, MoE


def parts(config: ModelConfig) -> Parts:
    """Return the parts of a model with `config.complex_layers`."""
    rule = config.complex_layers
    assert rule is not None
    epsilon = config.norm_epsilon

    def attention(place: AttentionPlace) -> nn.Module:
        return ComplexAttention(place, rule, epsilon)

    def ffn(model_dim: int, ffn_dim: int) -> nn.Module:
        return ComplexFFN(model_dim, ffn_dim, rule, epsilon)

    def moe(model_dim: int, moe: MoEConfig, index: int) -> MoE:
        return ComplexMoE(model_dim, moe, index, rule, epsilon)

    return Parts(ComplexNorm, ComplexResidualNorm, attention, ffn, moe, lambda model_dim: ComplexMerge(model_dim, rule))


def stack_parts(products: torch.Tensor, *, conjugate: bool) -> torch.Tensor:
    """Combine products of both parts of x with both parts of W into W conj(x), or W x.

    Args:
        products: [..., 2 (parts of x), M, 2 (parts of W), N]: the real products.
        conjugate: Whether to conjugate x.

    Returns:
        [..., M, 2 (parts), N].
    """
    of_real, of_imaginary = products.unbind(-4)
    turned = torch.stack([of_imaginary[..., 1, :], -of_imaginary[..., 0, :]], dim=-2)
    return of_real + turned if conjugate else of_real - turned


class ComplexLinear(Linear):
    """A complex linear layer: the weight [2N, D / 2] has the rows of Re W, then those of Im W."""

    quantizable = MappingProxyType({"weight": 1})
    is_complex = True

    def __init__(self, in_dim: int, out_dim: int, rule: ComplexConfig):
        super().__init__(in_dim // 2, out_dim, bias=False)
        self.conjugate = rule.conjugate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, D] to [T, 2N]; both are [real parts | imaginary parts]."""
        products = super().forward(x.reshape(2 * len(x), self.in_features))
        products = products.view(len(x), 2, 1, 2, self.out_features // 2)
        return stack_parts(products, conjugate=self.conjugate).flatten(1)


class ComplexMerge(ComplexLinear):
    """The projection of an MTP block from two complex vectors to one."""

    def __init__(self, model_dim: int, rule: ComplexConfig):
        super().__init__(2 * model_dim, model_dim, rule)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, 2D], two vectors of [real parts | imaginary parts], to [T, D]."""
        return super().forward(x.view(len(x), 2, 2, -1).transpose(1, 2).flatten(1))


class ComplexNorm(RMSNorm):
    """Divides by sqrt(mean |z|^2 + epsilon), one for both parts; real and imaginary parts have their own gains."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x [..., D]; shape and dtype do not change."""
        return rms_norm(x, self.weight * math.sqrt(0.5), self.epsilon / 2)


class ComplexResidualNorm(ComplexNorm):
    """The norm after an addition to the residual stream; see `layers.ResidualRMSNorm`."""

    def forward(self, x: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Return `x + added` [..., D] and its normalization."""
        total = x + added
        return total, super().forward(total)


class ComplexAttention(nn.Module):
    """Attention by Re<q, k>. The same real weights mix real and imaginary parts of the values."""

    def __init__(self, place: AttentionPlace, rule: ComplexConfig, epsilon: float):
        super().__init__()
        self.spec = spec = place.spec
        self.index = place.index
        self.value_scale = place.value_scale
        self.is_source = place.is_source
        self.query_scale = math.sqrt(2.0) if rule.score_scale == "complex_dim" else 1.0
        D, values = place.hidden_size, spec.num_heads * spec.value_dim
        self.q_proj = ComplexLinear(D, spec.num_heads * spec.key_dim, rule)
        self.k_proj = ComplexLinear(D, spec.num_kv_heads * spec.key_dim, rule)
        self.v_proj = ComplexLinear(D, spec.num_kv_heads * spec.value_dim, rule)
        self.sub_norm = ComplexNorm(values, epsilon) if rule.sub_norms else nn.Identity()
        self.o_proj = ComplexLinear(values, D, rule)
        self.attention_sink_bias = nn.Parameter(torch.zeros(spec.num_heads)) if spec.sink else None

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Map [T, D] to [T, D]."""
        spec, T = self.spec, len(x_TD)
        N, G, V = spec.num_heads, spec.num_kv_heads, spec.value_dim
        q_TNK = _by_head(self.q_proj(x_TD), N)
        if self.query_scale != 1.0:
            q_TNK = q_TNK * self.query_scale
        both = torch.cat([q_TNK, _by_head(self.k_proj(x_TD), G)], dim=1)
        q_TNK, k_TGK = apply_rotary(both, *context.rotary(spec, x_TD.dtype)).split_with_sizes([N, G], dim=1)
        v_TGV = _by_head(self.v_proj(x_TD), G)
        if self.value_scale != 1.0:
            v_TGV = v_TGV * self.value_scale
        call = AttentionCall(
            self.index,
            q_TNK,
            k_TGK,
            v_TGV,
            self.attention_sink_bias,
            spec.window_keys,
            is_source=self.is_source,
            score_block=spec.score_block,
        )
        out_TNV = context.attend(call).out_TNV
        return self.o_proj(self.sub_norm(out_TNV.reshape(T, N, 2, V // 2).transpose(1, 2).flatten(1)))


def _by_head(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rearrange [T, 2 x heads x K / 2] to [T, heads, K], each head [real parts | imaginary parts]."""
    return x.view(len(x), 2, num_heads, -1).transpose(1, 2).flatten(2)


def gated(gate: torch.Tensor, up: torch.Tensor, rule: ComplexConfig) -> torch.Tensor:
    """Return conj(act(gate)) * up as complex products, [..., F] of [real parts | imaginary parts].

    relu2 squares each part, and is zero where both parts are negative. swiglu applies silu to each part.
    """
    re, im = gate.chunk(2, dim=-1)
    if rule.gate == "relu2":
        kept = ((re >= 0) | (im >= 0)).to(re.dtype)
        re, im = kept * re * re, kept * im * im
    else:
        re, im = F.silu(re), F.silu(im)
    up_re, up_im = up.chunk(2, dim=-1)
    return torch.cat([re * up_re + im * up_im, re * up_im - im * up_re], dim=-1)


class ComplexFFN(nn.Module):
    """down(norm(conj(act(gate(x))) * up(x)))."""

    def __init__(self, model_dim: int, ffn_dim: int, rule: ComplexConfig, epsilon: float):
        super().__init__()
        self.rule = rule
        self.gate_proj = ComplexLinear(model_dim, ffn_dim, rule)
        self.up_proj = ComplexLinear(model_dim, ffn_dim, rule)
        self.sub_norm = ComplexNorm(ffn_dim, epsilon) if rule.sub_norms else nn.Identity()
        self.down_proj = ComplexLinear(ffn_dim, model_dim, rule)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Map [T, D] to [T, D]."""
        return self.down_proj(self.sub_norm(gated(self.gate_proj(x_TD), self.up_proj(x_TD), self.rule)))


class ComplexExperts(Experts):
    """Complex expert MLPs: gate and up rows [E, 2F, D / 2] and down [E, D, F / 2]. The experts share the norm."""

    is_complex = True

    def __init__(self, model_dim: int, moe: MoEConfig, rule: ComplexConfig, epsilon: float):
        super().__init__(model_dim, moe)
        self.rule = rule
        self.gate_up_proj = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.expert_dim, model_dim // 2))
        self.down_proj = nn.Parameter(torch.empty(moe.num_experts, model_dim, moe.expert_dim // 2))
        self.sub_norm = ComplexNorm(moe.expert_dim, epsilon) if rule.sub_norms else nn.Identity()

    def forward(self, x_TD: torch.Tensor, ids_TA: torch.Tensor, weights_TA: torch.Tensor) -> torch.Tensor:
        """Map [T, D] to [T, D]. A token's experts are added in the order of their numbers."""
        gate_up, down = (unbind(self.weight_as(name, x_TD.dtype)) for name in ("gate_up_proj", "down_proj"))
        conjugate, out_TD = self.rule.conjugate, torch.zeros(x_TD.shape, dtype=weights_TA.dtype, device=x_TD.device)
        for expert in ids_TA.unique().tolist():
            token, slot = torch.where(ids_TA == expert)
            rows = x_TD[token].view(2 * len(token), -1)
            both = linear(rows, gate_up[expert]).view(len(token), 2, 2, 2, -1)
            gate, up = stack_parts(both, conjugate=conjugate).flatten(2).unbind(1)
            hidden = self.sub_norm(gated(gate, up, self.rule)).view(2 * len(token), -1)
            out = stack_parts(linear(hidden, down[expert]).view(len(token), 2, 1, 2, -1), conjugate=conjugate)
            weighted = out.flatten(1).to(out_TD.dtype) * weights_TA[token, slot, None]
            out_TD = out_TD.index_add(0, token, weighted)
        return out_TD.to(x_TD.dtype)


class ComplexMoE(MoE):
    """A real router, which reads the stacked state, and complex experts."""

    def __init__(self, model_dim: int, moe: MoEConfig, index: int, rule: ComplexConfig, epsilon: float):
        super().__init__(model_dim, moe, index)
        self.experts = ComplexExperts(model_dim, moe, rule, epsilon)
