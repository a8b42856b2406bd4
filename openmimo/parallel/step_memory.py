"""Bytes of the activations of a training step, predicted for each option of `ActivationConfig`; and the longest row.

A block is a decoder layer or an MTP block. A step holds most when it goes backward through a late block: the kept
tensors of this block and of those before it, what is computed again in this block, and the gradients between its
operations. The counts are those of tensors that autograd saves with kernels that make no copies; a test compares them
with measured ones (docs/long_context.md).

Bytes are per token of a rank, if not stated otherwise. D model dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from openmimo.model.attention import AttentionPlace
from openmimo.model.config import (
    ActivationConfig,
    ModelConfig,
    attention_flops_per_token,
    attention_parameters,
    training_flops_per_token,
)
from openmimo.parallel.head_exchange import gathered_heads

WIDE_BYTES = 4  # of numbers that are float32 in every run
ID_BYTES = 8
LOSS_TILE_TOKENS = 512
FFN_CHUNKS = 16  # of the options that `openmimo plan --longest` compares


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of a block for each token.

    Attributes:
        inputs: Its own inputs, which every option keeps.
        norms: Inputs and outputs of its norms and of its merging projection, without `inputs`.
        attention: Queries, keys, values, output and statistics of the attention operation.
        router: Scores, weights and ids of the router.
        ffn: Intermediate results of the FFN or the experts.
        ffn_gradients: Gradients within the FFN at their largest.
        gradients: The same outside of it.
    """

    inputs: float
    norms: float
    attention: float
    router: float
    ffn: float
    ffn_gradients: float
    gradients: float

    def kept(self, what: str, *, chunks: int) -> float:
        """Return the bytes that stay until the backward pass.

        Args:
            what: What is recomputed, a value of `ActivationConfig.recompute`, or "none".
            chunks: Parts of the FFN.
        """
        ffn = self.ffn if chunks == 1 else 0.0
        return (
            self.inputs
            + {
                "none": self.norms + self.attention + self.router + ffn,
                "attention": self.norms + self.router + ffn,
                "ffn": self.norms + self.attention,
                "but_attention": self.attention,
                "layers": 0.0,
            }[what]
        )

    def running(self, *, chunks: int) -> float:
        """Return the bytes of the block during its own backward pass, in addition to its inputs."""
        inside = self.norms + self.attention + self.router
        return inside + max((self.ffn + self.ffn_gradients) / chunks, self.gradients)


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step on one rank.

    Attributes:
        device: Bytes of the device for each token, at their peak.
        kept: Those that autograd keeps for the backward pass.
        host: Bytes of host memory for each token.
        fixed: Bytes that do not depend on the number of tokens, without weights, gradients and optimizer.
    """

    device: float
    kept: float
    host: float
    fixed: float


@dataclass(frozen=True)
class Part:
    """The part of a model that one rank computes.

    Attributes:
        layers: Indices of its layers (None: all).
        has_heads: Whether it has the MTP blocks, the output head and the loss.
        tp: Ranks that share the heads and hidden dims of a layer, and the vocabulary.
        ep: Ranks that share the experts.
    """

    layers: tuple[int, ...] | None = None
    has_heads: bool = True
    tp: int = 1
    ep: int = 1

    def layers_of(self, config: ModelConfig) -> tuple[int, ...]:
        """Return the indices of its layers."""
        return tuple(range(len(config.layers))) if self.layers is None else self.layers

    def num_heads(self, config: ModelConfig) -> int:
        """Return the number of its output heads, with those of MTP blocks."""
        return 1 + config.num_mtp_heads if self.has_heads else 0


WHOLE_MODEL = Part()


def step_bytes(
    config: ModelConfig,
    activations: ActivationConfig,
    *,
    recompute: bool,
    activation_bytes: int,
    part: Part = WHOLE_MODEL,
) -> StepBytes:
    """Predict the activations of a step.

    Args:
        config: The model.
        activations: What is kept.
        recompute: Whether activations are recomputed (`activation_checkpointing`).
        activation_bytes: Bytes of an activation.
        part: The part of the model on the rank.
    """
    kept: list[float] = []
    peak = 0.0
    blocks = list(_blocks(config, activation_bytes, part))
    for number, block in enumerate(blocks):
        is_recomputed = recompute and number % activations.recompute_every == 0
        what = activations.recompute if is_recomputed else "none"
        chunks = activations.ffn_chunks
        kept.append(block.kept(what, chunks=chunks))
        before = kept[-2:-1] if activations.offload else kept[:-1]
        peak = max(peak, sum(before) + block.inputs + block.running(chunks=chunks))
    # the input of the final norm, which the MTP heads share
    always = config.hidden_size * activation_bytes if part.has_heads else 0.0
    around = always + _around(config, activation_bytes, part)
    host = sum(kept) if activations.offload else 0.0
    return StepBytes(
        device=peak + around,
        kept=sum(kept) + always,
        host=host,
        fixed=_fixed(config, activation_bytes, part, every_cast=not recompute),
    )


@dataclass(frozen=True)
class Longest:
    """The longest row that a step of one row can train on, with one option.

    Attributes:
        activations: What is kept.
        recompute: Whether activations are recomputed.
        tokens: Tokens of the row, a multiple of 1,024; 0 if none fits.
        step: Bytes of the step.
        work: FLOPs of a step on this row.
    """

    activations: ActivationConfig
    recompute: bool
    tokens: int
    step: StepBytes
    work: float


def options() -> Iterator[tuple[ActivationConfig, bool]]:
    """Yield the options that `openmimo plan --longest` compares, with whether activations are recomputed."""
    yield ActivationConfig(), False
    yield ActivationConfig(ffn_chunks=FFN_CHUNKS), False
    yield ActivationConfig(recompute="attention"), True
    yield ActivationConfig(recompute="ffn"), True
    for config in (ActivationConfig(recompute="but_attention"), ActivationConfig(recompute="layers")):
        yield config, True
        yield replace(config, ffn_chunks=FFN_CHUNKS), True
        yield replace(config, ffn_chunks=FFN_CHUNKS, offload=True), True


def longest(
    config: ModelConfig,
    activations: ActivationConfig,
    *,
    recompute: bool,
    memory_bytes: float,
    state_bytes: float,
    activation_bytes: int = 2,
    cp: int = 1,
    cp_exchange: str = "auto",
) -> Longest:
    """Find the longest row that fits.

    Args:
        config: The model.
        activations: What is kept.
        recompute: Whether activations are recomputed.
        memory_bytes: Memory of a rank that may be used.
        state_bytes: Bytes of weights, gradients and optimizer on a rank.
        activation_bytes: Bytes of an activation.
        cp: Ranks that share the tokens. A full layer gathers the keys and values of all, or some heads of all.
        cp_exchange: Which of both; see `parallel.head_exchange`.
    """
    step = step_bytes(config, activations, recompute=recompute, activation_bytes=activation_bytes)
    gathered = 0
    if cp > 1:
        places = [config.attention_place(index) for index in range(len(config.attention_layers()))]
        gathered = max((_gathered(place, cp_exchange, cp) for place in places), default=0)
    per_token = step.device / cp + 2 * gathered * activation_bytes  # with their gradients
    tokens = max(int((memory_bytes - state_bytes - step.fixed) / per_token), 0) // 1024 * 1024
    work = tokens * _flops_per_token(config, activations, tokens, recompute=recompute) if tokens else 0.0
    return Longest(activations, recompute, tokens, step, work)


def _gathered(place: AttentionPlace, cp_exchange: str, cp: int) -> int:
    """Return the numbers of every token of the row that a rank holds in a full layer; 0 for a sliding one."""
    spec = place.spec
    if spec.window_keys is not None:
        return 0
    return gathered_heads(place, cp_exchange, cp) * (spec.key_dim + spec.value_dim)


def _flops_per_token(config: ModelConfig, activations: ActivationConfig, length: int, *, recompute: bool) -> float:
    """Return the FLOPs of a token in a step, with what is computed again."""
    total = training_flops_per_token(config, length)
    layers = range(len(config.attention_layers()))
    products = sum(2 * attention_parameters(config, index) for index in layers)
    operations = sum(attention_flops_per_token(spec, length) for spec in config.attention_layers())
    head = 2 * (1 + config.num_mtp_heads) * config.vocab_size * config.hidden_size  # never computed again
    ffn = total / 3 - products - operations - head
    again = ffn if activations.ffn_chunks > 1 else 0.0
    if recompute:
        parts = {"ffn": ffn, "attention": products + operations, "but_attention": products + ffn}
        again += parts.get(activations.recompute, products + operations + ffn) / activations.recompute_every
    return total + again


def gathered_bytes(config: ModelConfig) -> float:
    """Return the bytes of the largest layer's weights in float32 where layers are gathered.

    They are those of a layer that runs and of one on its way, and the gradients of one.
    """
    return 3 * WIDE_BYTES * max(_weights(config, index, WHOLE_MODEL) for index in range(len(config.layers)))


def _blocks(config: ModelConfig, size: int, part: Part) -> Iterator[BlockBytes]:
    """Yield the blocks in the order of the forward pass."""
    D, tp = config.hidden_size, part.tp
    for index in part.layers_of(config):
        layer = config.layers[index]
        router, ffn, ffn_gradients = 0.0, 4 * config.dense_ffn_dim / tp, 3 * config.dense_ffn_dim / tp + D
        if layer.ffn == "moe":
            assert config.moe is not None, "checked by the config"
            E, A, F = config.moe.num_experts, config.moe.experts_per_token, config.moe.expert_dim
            wide = WIDE_BYTES / size  # the router's input and the outputs that are summed are float32
            router = WIDE_BYTES * (2 * E + 2 * A + 4 + (D if wide > 1 else 0)) + ID_BYTES * (A + 1)
            ffn = A * (D + wide * D + 4 * F) + A * (ID_BYTES + WIDE_BYTES) / size
            ffn_gradients = A * (wide * D + F) + D
        yield _block(config, index, size, tp, inputs=D, norms=3 * D, router=router, ffn=ffn, grown=ffn_gradients)
    for head in range(config.num_mtp_heads if part.has_heads else 0):
        ffn, grown = 4 * config.dense_ffn_dim / tp, 3 * config.dense_ffn_dim / tp + D
        yield _block(
            config, len(config.layers) + head, size, tp, inputs=D, norms=7 * D, router=0.0, ffn=ffn, grown=grown
        )


def _block(
    config: ModelConfig, index: int, size: int, tp: int, *, inputs: int, norms: int, router: float, ffn: float,
    grown: float,
) -> BlockBytes:  # fmt: skip
    """Return a block; all arguments but `router` are counts of activations."""
    spec = config.attention_place(index).spec
    queries, keys = spec.num_heads / tp, max(spec.num_kv_heads / tp, 1)
    heads = (queries + keys) * spec.key_dim + keys * spec.value_dim
    out = queries * spec.value_dim
    return BlockBytes(
        inputs=inputs * size,
        norms=norms * size + 2 * WIDE_BYTES,
        attention=(heads + out) * size + queries * WIDE_BYTES,
        router=router,
        ffn=ffn * size,
        ffn_gradients=grown * size,
        gradients=(2 * heads + out + config.hidden_size) * size,
    )


def _around(config: ModelConfig, size: int, part: Part) -> float:
    """Return the bytes of a token that stay for the whole step: states of the heads, tables, ids."""
    heads, moe = part.num_heads(config), config.moe
    states = 2 * heads * config.hidden_size * size  # with their gradients, which the loss computes at once
    rotations = {(spec.rotation.rotary_dim, spec.rotation.theta) for spec in config.attention_layers()}
    tables = sum(2 * dims for dims, _ in rotations) * size
    sparse = sum(config.layers[index].ffn == "moe" for index in part.layers_of(config))
    routes = 0 if moe is None else sparse * moe.experts_per_token * ID_BYTES
    return states + tables + routes + ID_BYTES * (2 + 2 * heads)


def _fixed(config: ModelConfig, size: int, part: Part, *, every_cast: bool) -> float:
    """Return the bytes of buffers of the token loss, and of weights in the dtype of the activations."""
    loss, heads = 0.0, part.num_heads(config)
    if heads:
        tile = LOSS_TILE_TOKENS * config.vocab_size * (size + WIDE_BYTES)
        loss = (config.vocab_size * config.hidden_size * (WIDE_BYTES + heads * size) + tile) / part.tp
    if size == WIDE_BYTES:
        return loss
    layers = [_weights(config, index, part) for index in part.layers_of(config)]
    return loss + size * (sum(layers) if every_cast else max(layers, default=0.0))


def _weights(config: ModelConfig, index: int, part: Part) -> float:
    """Return the number of weights of a layer that a rank casts."""
    D, total = config.hidden_size, attention_parameters(config, index) / part.tp
    if config.layers[index].ffn == "dense":
        return total + 3 * D * config.dense_ffn_dim / part.tp
    assert config.moe is not None, "checked by the config"
    return total + 3 * D * config.moe.num_experts * config.moe.expert_dim / part.ep
