"""Count parameters and floating-point operations of a config, without torch."""

from openmimo.model.attention import attention_kind
from openmimo.model.config import ModelConfig
from openmimo.model.geometry import AttentionConfig


def attention_parameters(config: ModelConfig, index: int) -> int:
    """Parameters of the attention module of layer `index`; MTP head h is layer `len(layers) + h`."""
    place = config.attention_place(index)
    return attention_kind(place.spec.kind).parameters(place)


def active_matmul_parameters(config: ModelConfig) -> int:
    """Active parameters per token of the main model's matrix products: with the output head, without the embedding."""
    D = config.hidden_size
    total = D * config.vocab_size
    for index, layer in enumerate(config.layers):
        total += attention_parameters(config, index)
        if layer.ffn == "dense":
            total += 3 * D * config.dense_ffn_dim
        else:
            assert config.moe is not None, "checked by the config"
            total += D * config.moe.num_experts + config.moe.experts_per_token * 3 * D * config.moe.expert_dim
    return total


def mtp_matmul_parameters(config: ModelConfig) -> int:
    """Active parameters per token of all MTP heads, each with its own pass through the output head."""
    if config.mtp is None:
        return 0
    D = config.hidden_size
    block = 2 * D * D + attention_parameters(config, len(config.layers)) + 3 * D * config.dense_ffn_dim
    return config.mtp.num_layers * (block + D * config.vocab_size)


def attention_flops_per_token(spec: AttentionConfig, length: int) -> float:
    """Forward FLOPs of one layer's scores and weighted values, averaged over the positions of a sequence."""
    kind = attention_kind(spec.kind)
    reach = kind.visible_keys(spec, length - 1)
    # The first `reach` queries see 1, 2, ... reach keys; the others see `reach`.
    mean_keys = (reach * (reach + 1) / 2 + (length - reach) * reach) / length
    return 2 * spec.num_heads * (spec.key_dim + spec.value_dim) * mean_keys


def training_flops_per_token(config: ModelConfig, length: int) -> float:
    """Forward and backward FLOPs of one token in a sequence: three times the forward pass, MTP heads included."""
    matmul = 2 * (active_matmul_parameters(config) + mtp_matmul_parameters(config))
    attention = sum(attention_flops_per_token(spec, length) for spec in config.attention_layers())
    return 3 * (matmul + attention)
