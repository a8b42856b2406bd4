"""The parts of a decoder layer, and the embedding. Attribute names follow the published checkpoint.

T packed tokens, D model dim, N query heads, G key/value heads, K key dim, V value dim.

Parameters may be kept in a wider dtype than the activations (float32 master weights, bfloat16 activations): every layer
casts its weights to the dtype of its input. Only a module's own `forward` reads its weights, so that hooks,
parametrizations, sharded weights and replaced modules take effect.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from openmimo.core.registry import load_object
from openmimo.kernels.attention import FreshHeads
from openmimo.kernels.operations import add_rms_norm, joined_linear, rms_norm
from openmimo.kernels.weights import BlockScaled, Float8Latent, Latent, Packed, Weight
from openmimo.model.attention import AttentionPlace, build_attention
from openmimo.model.config import ModelConfig, MoEConfig
from openmimo.model.context import AttentionCall, AttentionContext
from openmimo.model.moe import MoE
from openmimo.model.weight_formats import QuantizableModule

_LOCAL_WEIGHTS = (nn.Parameter, torch.Tensor, BlockScaled, Packed, Latent, Float8Latent)


def as_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert to `dtype`, without a torch call if not necessary, because decoding calls this 100 times per token."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class Linear(QuantizableModule, nn.Linear):
    """A linear layer that computes in the dtype of its input. Its weight may be in any format of `kernels.weights`."""

    quantizable = MappingProxyType({"weight": 1})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., in] to [..., out]."""
        weight, bias = self.parameters_as(x.dtype)
        if type(weight) in _LOCAL_WEIGHTS:
            return joined_linear(x, ((weight, bias),))
        assert isinstance(weight, torch.Tensor)  # a distributed tensor, for example
        return F.linear(x, weight, bias)

    @property
    def is_joinable(self) -> bool:
        """Whether `project` may compute this layer without calling it, because a call would run nothing but `forward`.

        False for a subclass (FSDP and parametrizations replace the class), with hooks or a replaced `forward`, and if
        the weight is not a local parameter.
        """
        attributes = (
            self.__dict__
        )  # one attribute lookup instead of nine: decoding reads this property 100 times per token
        return not (
            type(self) is not Linear
            or attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
            or type(attributes["_parameters"]["weight"]) is not nn.Parameter
            or "forward" in attributes
        )

    def parameters_as(self, dtype: torch.dtype) -> tuple[Weight, torch.Tensor | None]:
        """Return weight and bias (or None) for a product in `dtype`; see `weight_as`."""
        weight = self.weight_as("weight", dtype)
        bias = self._parameters["bias"] if "bias" in self._parameters else self.bias  # noqa: SIM401  (getattr is slow)
        return weight, None if bias is None else as_dtype(bias, dtype)


def project(x: torch.Tensor, layers: tuple[Linear, ...]) -> torch.Tensor:
    """Apply several layers to one input x [..., in] and concatenate their outputs: [..., sum of out].

    Joinable layers are one kernel call; other layers are called one by one.
    """
    has_global_hooks = (
        _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
    )
    if not has_global_hooks and all([layer.is_joinable for layer in layers]):
        return joined_linear(x, tuple([layer.parameters_as(x.dtype) for layer in layers]))
    return torch.cat([layer(x) for layer in layers], dim=-1)


class Embedding(nn.Embedding):
    """Token embeddings."""

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self._stored().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self._stored().dtype

    def _stored(self) -> torch.Tensor:
        """Return the weight, or the parameter from which a parametrization computes it."""
        weight = self._parameters.get("weight")
        return next(self.parameters()) if weight is None else weight

    def forward(self, tokens_T: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Map token ids, int64 [T], to embeddings [T, D] in `dtype` (None: that of the weight)."""
        x_TD = F.embedding(tokens_T, self.weight)
        return x_TD if dtype is None else as_dtype(x_TD, dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm. Statistics are float32; the weight is applied after the cast back, as in transformers."""

    def __init__(self, dim: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x [..., D]; shape and dtype do not change."""
        return rms_norm(x, self.weight, self.epsilon)


class ResidualRMSNorm(RMSNorm):
    """The norm after an addition to the residual stream, computed with the sum."""

    def forward(self, x: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Return `x + added` [..., D] and its normalization."""
        return add_rms_norm(x, added, self.weight, self.epsilon)


class DenseFFN(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, model_dim: int, ffn_dim: int):
        super().__init__()
        self.gate_proj = Linear(model_dim, ffn_dim, bias=False)
        self.up_proj = Linear(model_dim, ffn_dim, bias=False)
        self.down_proj = Linear(ffn_dim, model_dim, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Map [T, D] to [T, D]."""
        gate, up = project(x_TD, (self.gate_proj, self.up_proj)).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Attention(nn.Module):
    """Grouped-query attention with partial RoPE, a value scale, and a learned sink if the geometry has one.

    Values are scaled right after their projection, so a cache stores them scaled (paper section 2.2; the scale and the
    position of the sink logit are those of the published checkpoint).
    """

    def __init__(self, place: AttentionPlace):
        super().__init__()
        self.spec = spec = place.spec
        self.index = place.index
        self.value_scale = place.value_scale
        self.is_source = place.is_source
        D, bias = place.hidden_size, place.bias
        self.q_proj = Linear(D, spec.num_heads * spec.key_dim, bias=bias)
        self.k_proj = Linear(D, spec.num_kv_heads * spec.key_dim, bias=bias)
        self.v_proj = Linear(D, spec.num_kv_heads * spec.value_dim, bias=bias)
        self.o_proj = Linear(spec.num_heads * spec.value_dim, D, bias=False)
        self.attention_sink_bias = nn.Parameter(torch.zeros(spec.num_heads)) if spec.sink else None

    def sink(self) -> torch.Tensor | None:
        """Return the sink logits [N], or None if the geometry has none."""
        return self.attention_sink_bias

    def forward(self, x_TD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Map [T, D] to [T, D]."""
        spec, T = self.spec, x_TD.shape[0]
        N, G, K, V = spec.num_heads, spec.num_kv_heads, spec.key_dim, spec.value_dim
        cos_TR, sin_TR = context.rotary(spec, x_TD.dtype) if spec.rotary_dim else (None, None)
        joined_TJ = project(x_TD, (self.q_proj, self.k_proj, self.v_proj))
        call = AttentionCall(
            self.index,
            FreshHeads(joined_TJ, N, G, K, V, cos_TR, sin_TR, self.value_scale),
            None,
            None,
            self.sink(),
            spec.window_keys,
            is_source=self.is_source,
            score_block=spec.score_block,
        )
        return self.o_proj(context.attend(call).out_TNV.reshape(T, N * V))


@dataclass(frozen=True)
class Parts:
    """The modules of a decoder layer and of an MTP block, real or complex.

    Attributes:
        norm: Builds a norm of a dim with an epsilon.
        residual_norm: Builds the norm after an addition to the residual stream; see `ResidualRMSNorm`.
        attention: Builds an attention layer.
        ffn: Builds a dense FFN of a model dim and a hidden dim.
        moe: Builds a sparse FFN of a model dim, for a layer index.
        merge: Builds the projection of an MTP block from two vectors of the model dim to one.
    """

    norm: Callable[[int, float], RMSNorm]
    residual_norm: Callable[[int, float], nn.Module]
    attention: Callable[[AttentionPlace], nn.Module]
    ffn: Callable[[int, int], nn.Module]
    moe: Callable[[int, MoEConfig, int], MoE]
    merge: Callable[[int], Linear]


def parts_of(config: ModelConfig) -> Parts:
    """Return the parts of which a model consists."""
    if config.complex_layers is not None:
        return load_object("openmimo.model.complex_layers:parts")(config)
    return Parts(
        RMSNorm,
        ResidualRMSNorm,
        build_attention,
        DenseFFN,
        MoE,
        lambda model_dim: Linear(2 * model_dim, model_dim, bias=False),
    )
