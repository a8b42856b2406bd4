"""The memory, communication and time of a training step on a mesh, predicted from the geometry, and a search of meshes.

The bytes of weights and of messages are exact for an even load of the experts; tests compare them with those of real
processes. Activations are estimated from the tensors that autograd saves. The time is that of the products at a stated
fraction of the card's peak, or of the gathering of weights if that takes longer, because both overlap; the other
messages are added, because the layers wait for them.

T tokens of a micro-batch on one rank, D model dim.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from openmimo.core.errors import ConfigError
from openmimo.model.attention import AttentionConfig, kv_spec
from openmimo.model.config import ModelConfig, attention_parameters, training_flops_per_token

MASTER_BYTES = 4  # weights, gradients and both moments are float32
STATES = 4


@dataclass(frozen=True)
class Card:
    """An accelerator, by its data sheet.

    Attributes:
        flops: Dense bfloat16 FLOP/s.
        memory_bytes: Memory.
        node_bytes_per_second: Bandwidth to the other cards of a machine, one direction.
        network_bytes_per_second: Bandwidth to cards of other machines, one direction.
        cards_per_node: Cards of a machine.
    """

    flops: float
    memory_bytes: float
    node_bytes_per_second: float
    network_bytes_per_second: float
    cards_per_node: int = 8


CARDS = {
    "a100": Card(312e12, 80e9, 300e9, 25e9),
    "h100": Card(989e12, 80e9, 450e9, 50e9),
    "h200": Card(989e12, 141e9, 450e9, 50e9),
    "b200": Card(2250e12, 180e9, 900e9, 50e9),
}


@dataclass(frozen=True)
class MeshSizes:
    """Sizes of a mesh; see `parallel.mesh`."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def weight_ranks(self) -> int:
        """Ranks over which plain weights are sharded."""
        return self.dp_shard * self.cp

    @property
    def row_ranks(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        sizes = [f"{field.name} {getattr(self, field.name)}" for field in fields(self)]
        return ", ".join(size for size in sizes if not size.endswith(" 1")) or "one process"


@dataclass(frozen=True)
class StepShape:
    """The work of an optimizer step.

    Attributes:
        sequence_length: Tokens of a row.
        rows: Rows of the step.
        micro_batch_rows: Rows of a micro-batch of one process.
        activation_bytes: Bytes of an activation.
        recompute: Whether layers recompute their activations in the backward pass.
    """

    sequence_length: int
    rows: int
    micro_batch_rows: int
    activation_bytes: int = 2
    recompute: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by part.

    Attributes:
        weights: Its shards of the weights.
        gradients: Its shards of the gradients.
        optimizer: Both moments of its shards.
        gathered: The whole weights of two layers, one running and one on its way, and the gradients of one.
        activations: Tensors kept for the backward pass of one micro-batch.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives in an optimizer step, by dimension of the mesh, mean over ranks.

    Attributes:
        shard: Weights gathered for the forward and the backward pass, and gradients of the shards.
        replicate: Gradients summed over replicas.
        cp: Keys and values, and their gradients.
        tp: Sums of outputs and of gradients.
        ep: Tokens sent to experts and back, and their gradients.
    """

    shard: float
    replicate: float
    cp: float
    tp: float
    ep: float


@dataclass(frozen=True)
class Plan:
    """The prediction for one mesh.

    Attributes:
        sizes: The mesh.
        memory: Bytes of a rank.
        traffic: Bytes that a rank receives in a step.
        compute_seconds: Time of the products.
        step_seconds: Time of an optimizer step.
        tokens_per_day: Tokens of 24 hours of such steps.
    """

    sizes: MeshSizes
    memory: Memory
    traffic: Traffic
    compute_seconds: float
    step_seconds: float
    tokens_per_day: float


@dataclass(frozen=True)
class _Weights:
    """Parameters by the way in which they are distributed."""

    plain: int
    divided: int  # over tensor-parallel ranks
    experts: int

    def __add__(self, other: "_Weights") -> "_Weights":
        return _Weights(self.plain + other.plain, self.divided + other.divided, self.experts + other.experts)

    def gathered(self, sizes: MeshSizes) -> float:
        """Parameters of a rank while a layer runs."""
        return self.plain + self.divided / sizes.tp + self.experts / sizes.ep

    def kept(self, sizes: MeshSizes) -> float:
        """Parameters that a rank keeps."""
        plain, experts = self.plain + self.divided / sizes.tp, self.experts
        return plain / sizes.weight_ranks + experts / sizes.weight_ranks


def plan(config: ModelConfig, sizes: MeshSizes, step: StepShape, card: Card, *, efficiency: float) -> Plan:
    """Predict a training step.

    Args:
        config: The model.
        sizes: The mesh.
        step: The work of the step.
        card: The accelerator.
        efficiency: Fraction of the card's peak at which the products of a step run.

    Raises:
        ConfigError: The mesh does not fit the model or the step.
    """
    check(config, sizes, step)
    micro_batches = step.rows // sizes.row_ranks // step.micro_batch_rows
    tokens = step.rows * step.sequence_length
    traffic = _traffic(config, sizes, step, micro_batches)
    ranks = sizes.row_ranks * sizes.cp * sizes.tp
    flops = training_flops_per_token(config, step.sequence_length) * (4 / 3 if step.recompute else 1)
    compute = flops * tokens / ranks / (card.flops * efficiency)
    overlapped = max(compute, traffic.shard / _bandwidth(card, sizes, "shard"))
    exposed = sum(getattr(traffic, name) / _bandwidth(card, sizes, name) for name in ("replicate", "cp", "tp", "ep"))
    seconds = overlapped + exposed
    return Plan(sizes, _memory(config, sizes, step), traffic, compute, seconds, tokens / seconds * 86_400)


def search(
    config: ModelConfig, step: StepShape, card: Card, *, num_cards: int, efficiency: float
) -> tuple[list[Plan], list[Plan]]:
    """Return the plans of all meshes of `num_cards` cards, the fastest first: those that fit, and those that do not."""
    plans = []
    for sizes in meshes(num_cards, card.cards_per_node):
        try:
            plans.append(plan(config, sizes, step, card, efficiency=efficiency))
        except ConfigError:
            continue
    plans.sort(key=lambda found: found.step_seconds)
    fits = [found.memory.total < 0.9 * card.memory_bytes for found in plans]  # a tenth for the allocator
    return (
        [found for found, is_small in zip(plans, fits, strict=True) if is_small],
        [found for found, is_small in zip(plans, fits, strict=True) if not is_small],
    )


def meshes(num_cards: int, cards_per_node: int) -> Iterator[MeshSizes]:
    """Yield the meshes of `num_cards` cards; tensor-parallel ranks share a machine."""
    for tp in _divisors(min(num_cards, cards_per_node)):
        if num_cards % tp:
            continue
        for cp in _divisors(num_cards // tp):
            for dp_shard in _divisors(num_cards // tp // cp):
                for ep in _divisors(dp_shard * cp):
                    yield MeshSizes(num_cards // tp // cp // dp_shard, dp_shard, cp, tp, ep)


def check(config: ModelConfig, sizes: MeshSizes, step: StepShape) -> None:
    """Raise ConfigError if a mesh does not fit a model or a step."""
    config.local(tp=sizes.tp)
    if sizes.weight_ranks % sizes.ep:
        raise ConfigError(f"ep {sizes.ep} does not divide dp_shard x cp = {sizes.weight_ranks}.")
    if sizes.ep > 1 and (config.moe is None or config.moe.num_experts % sizes.ep):
        raise ConfigError(f"ep {sizes.ep} does not divide the experts of the model.")
    if step.rows % (sizes.row_ranks * step.micro_batch_rows):
        raise ConfigError(
            f"{step.rows} rows cannot be divided into micro-batches of {step.micro_batch_rows} on {sizes.row_ranks} "
            "ranks."
        )
    if step.sequence_length * step.micro_batch_rows < 2 * sizes.cp:
        raise ConfigError(f"cp {sizes.cp} leaves less than one token a chunk.")


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


# --- weights ---------------------------------------------------------------------------------------------------------


def _attention_weights(config: ModelConfig, index: int, tp: int) -> _Weights:
    spec = config.attention_place(index).spec
    total = attention_parameters(config, index)
    kept_whole = spec.num_heads if spec.sink else 0
    keys = spec.num_kv_heads * (spec.key_dim + spec.value_dim)
    if config.attention_place(index).bias:
        kept_whole += spec.num_heads * spec.key_dim + keys
    if spec.num_kv_heads % tp:
        kept_whole += config.hidden_size * keys
    return _Weights(plain=kept_whole, divided=total - kept_whole, experts=0)


def _layer_weights(config: ModelConfig, index: int, tp: int) -> _Weights:
    D, layer = config.hidden_size, config.layers[index]
    weights = _attention_weights(config, index, tp) + _Weights(2 * D, 0, 0)
    if layer.ffn == "dense":
        return weights + _Weights(0, 3 * D * config.dense_ffn_dim, 0)
    assert config.moe is not None, "checked by the config"
    E = config.moe.num_experts
    return weights + _Weights(E * D, 0, 3 * E * D * config.moe.expert_dim)


def _units(config: ModelConfig, tp: int) -> list[tuple[_Weights, int]]:
    """Return the modules that are gathered at once, and how often in a forward and backward pass.

    Every MTP head calls the embedding and the output head once more. The gradient of token ids is not needed, so that
    the embedding is gathered once in the backward pass. A tied weight stays gathered from the forward to the backward
    pass.
    """
    D, heads = config.hidden_size, config.num_mtp_heads
    units = [(_layer_weights(config, index, tp), 2) for index in range(len(config.layers))]
    for head in range(heads):
        block = _Weights(2 * D * D + 5 * D, 3 * D * config.dense_ffn_dim, 0)
        units.append((block + _attention_weights(config, len(config.layers) + head, tp), 2))
    vocabulary = _Weights(0, config.vocab_size * D, 0)
    norm = _Weights(D, 0, 0)
    if config.tie_embeddings:
        return [*units, (vocabulary + norm, 1)]
    return [*units, (vocabulary, 2 + heads), (vocabulary, 2 + 2 * heads), (norm, 2)]


def kept_parameters(config: ModelConfig, sizes: MeshSizes) -> float:
    """Return the parameters that a rank keeps."""
    return sum(weights.kept(sizes) for weights, _ in _units(config, sizes.tp))


def _memory(config: ModelConfig, sizes: MeshSizes, step: StepShape) -> Memory:
    units = _units(config, sizes.tp)
    kept = kept_parameters(config, sizes) * MASTER_BYTES
    largest = max(weights.gathered(sizes) for weights, _ in units) * MASTER_BYTES
    return Memory(kept, kept, 2 * kept, 3 * largest, activation_bytes(config, sizes, step))


def activation_bytes(config: ModelConfig, sizes: MeshSizes, step: StepShape) -> float:
    """Estimate the bytes that autograd keeps for the backward pass of one micro-batch on one rank."""
    T = step.micro_batch_rows * step.sequence_length / sizes.cp
    layers = [_layer_activations(config, index, sizes.tp) for index in range(len(config.layers))]
    heads = [
        _attention_activations(config, len(config.layers) + head, sizes.tp)
        + 3 * config.dense_ffn_dim / sizes.tp
        + 7 * config.hidden_size
        for head in range(config.num_mtp_heads)
    ]
    kept = len(layers) * config.hidden_size + max(layers) if step.recompute else sum(layers)
    return T * step.activation_bytes * (kept + sum(heads) + 3 * config.hidden_size)


def _attention_activations(config: ModelConfig, index: int, tp: int) -> float:
    """Return the saved values of a token: input and norm, projections, rotated and scaled, output."""
    spec = config.attention_place(index).spec
    queries, keys = spec.num_heads / tp, max(spec.num_kv_heads / tp, 1)
    projected = (queries + keys) * spec.key_dim + keys * spec.value_dim
    return 2 * config.hidden_size + 2 * projected + queries * spec.value_dim


def _layer_activations(config: ModelConfig, index: int, tp: int) -> float:
    D = config.hidden_size
    attention = _attention_activations(config, index, tp)
    if config.layers[index].ffn == "dense":
        return attention + 2 * D + 4 * config.dense_ffn_dim / tp
    assert config.moe is not None, "checked by the config"
    A, F = config.moe.experts_per_token, config.moe.expert_dim
    return attention + 2 * D + A * (2 * D + 4 * F) + 2 * config.moe.num_experts


# --- messages --------------------------------------------------------------------------------------------------------


def _traffic(config: ModelConfig, sizes: MeshSizes, step: StepShape, micro_batches: int) -> Traffic:
    passes = 3 if step.recompute else 2  # forward, backward, and the forward again
    T = step.micro_batch_rows * step.sequence_length / sizes.cp
    width = T * config.hidden_size * step.activation_bytes
    shard = replicate = 0.0
    for weights, gathers in _units(config, sizes.tp):
        plain = (weights.plain + weights.divided / sizes.tp) * MASTER_BYTES
        experts = weights.experts / sizes.ep * MASTER_BYTES
        for size, ranks in ((plain, sizes.weight_ranks), (experts, sizes.weight_ranks // sizes.ep)):
            shard += micro_batches * (gathers + 1) * size * (ranks - 1) / ranks  # gradients are scattered once
            replicate += micro_batches * 2 * size / ranks * (sizes.dp_replicate - 1) / sizes.dp_replicate
    cp = sum(_fetched_values(config, index, sizes, step) for index in range(len(config.attention_layers())))
    sums = 2 * (len(config.layers) + config.num_mtp_heads)
    sums -= sum(layer.ffn != "dense" for layer in config.layers)
    tp = sums * passes * 2 * width * (sizes.tp - 1) / sizes.tp
    tp += _vocabulary_sums(config, sizes, step) * 2 * (sizes.tp - 1) / sizes.tp
    sparse, ep = sum(layer.ffn == "moe" for layer in config.layers), 0.0
    if config.moe is not None:
        choices = width * config.moe.experts_per_token
        ep = sparse * passes * 2 * choices * (sizes.ep - 1) / sizes.ep
    return Traffic(
        shard, replicate, micro_batches * passes * cp * step.activation_bytes, micro_batches * tp, micro_batches * ep
    )


def _vocabulary_sums(config: ModelConfig, sizes: MeshSizes, step: StepShape) -> float:
    """Return the bytes that the tensor-parallel ranks add up for embedding and losses, if a row is one document.

    The embedding sums its outputs, and each loss the gradient of its inputs, and of each label the maximum, the sum and
    the label's logit in float32.
    """
    if sizes.tp == 1:
        return 0.0
    heads, rows = 1 + config.num_mtp_heads, step.micro_batch_rows / sizes.cp
    vector = config.hidden_size * step.activation_bytes
    labels = sum(rows * max(step.sequence_length - 1 - head, 0) for head in range(heads))
    return heads * rows * step.sequence_length * vector + labels * (vector + 3 * 4)


def _fetched_values(config: ModelConfig, index: int, sizes: MeshSizes, step: StepShape) -> float:
    """Return the keys' and values' numbers that a rank fetches in one layer and micro-batch, mean over ranks."""
    spec = config.attention_place(index).spec
    if sizes.cp == 1 or kv_spec(spec).source_layer is not None:
        return 0.0
    kv_heads = max(spec.num_kv_heads / sizes.tp, 1)
    rows = fetched_rows(spec, sizes.cp, step.sequence_length, step.micro_batch_rows)
    return rows * kv_heads * (spec.key_dim + spec.value_dim)


@functools.cache
def fetched_rows(spec: AttentionConfig, cp: int, sequence_length: int, micro_batch_rows: int) -> float:
    """Return the rows that a rank fetches from others for one layer, mean over ranks.

    Each of the rows of a micro-batch is one document of `sequence_length` tokens.
    """
    T = sequence_length * micro_batch_rows
    bounds = [number * T // (2 * cp) for number in range(2 * cp + 1)]
    fetched = 0
    for rank in range(cp):
        held = [(bounds[chunk], bounds[chunk + 1]) for chunk in (rank, 2 * cp - 1 - rank)]
        needed = set()
        for start, stop in held:
            first_row, last_row = start // sequence_length, math.ceil(stop / sequence_length)
            for row in range(first_row, last_row):
                begin, end = max(start, row * sequence_length), min(stop, (row + 1) * sequence_length)
                reach = begin if spec.window_keys is None else max(begin - spec.window_keys + 1, row * sequence_length)
                needed.add((row * sequence_length if spec.window_keys is None else reach, end))
        fetched += _length(needed | set(held)) - _length(set(held))
    return fetched / cp


def _length(ranges: set[tuple[int, int]]) -> int:
    """Return the number of integers in a union of ranges."""
    total = reached = 0
    for start, stop in sorted(ranges):
        total += max(stop - max(start, reached), 0)
        reached = max(reached, stop)
    return total


def _bandwidth(card: Card, sizes: MeshSizes, name: str) -> float:
    """Return the bandwidth of the slowest link of a dimension. The mesh has tp innermost, then cp, then dp_shard."""
    span = {
        "tp": sizes.tp,
        "ep": sizes.tp * sizes.ep,
        "cp": sizes.tp * sizes.cp,
        "shard": sizes.tp * sizes.weight_ranks,
        "replicate": sizes.tp * sizes.weight_ranks * sizes.dp_replicate,
    }[name]
    return card.node_bytes_per_second if span <= card.cards_per_node else card.network_bytes_per_second
