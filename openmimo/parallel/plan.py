"""The memory, communication and time of a training step on a mesh, predicted from the geometry, and a search of meshes.

The bytes of weights and of messages are exact for an even load of the experts; tests compare them with those of real
processes. Activations are those of `parallel.step_memory`, at their peak. The time is that of the products at a stated
fraction of the card's peak, or of the gathering of weights if that takes longer, because both overlap; the other
messages are added, because the layers wait for them. With pipeline stages, it is the time of the slowest rank, and once
the time that one micro-batch needs on the others, during which that rank waits.

T tokens of a micro-batch on one rank, D model dim.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from openmimo.core.errors import ConfigError
from openmimo.model.attention import AttentionConfig, kv_spec
from openmimo.model.config import (
    ActivationConfig,
    ModelConfig,
    attention_parameters,
    local_heads,
    training_flops_per_token,
)
from openmimo.parallel.head_exchange import (
    check_exchange,
    exchanges_heads,
    head_shares,
    moved_heads,
    union_length,
    why_only_keys,
)
from openmimo.parallel.stages import allowed_boundaries, layer_costs, stage_layers
from openmimo.parallel.step_memory import Part, StepBytes, step_bytes

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
    pp: int = 1
    stages_per_rank: int = 1

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.pp * self.row_ranks * self.cp * self.tp

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return self.pp * self.stages_per_rank

    @property
    def weight_ranks(self) -> int:
        """Ranks over which plain weights are sharded."""
        return self.dp_shard * self.cp

    @property
    def row_ranks(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        sizes = [f"{field.name.replace('_per_rank', ' a rank')} {getattr(self, field.name)}" for field in fields(self)]
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
        cp_exchange: What full layers exchange under context parallelism; see `parallel.head_exchange`.
    """

    sequence_length: int
    rows: int
    micro_batch_rows: int
    activation_bytes: int = 2
    recompute: bool = False
    cp_exchange: str = "auto"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by part.

    Attributes:
        weights: Its shards of the weights.
        gradients: Its shards of the gradients.
        optimizer: Both moments of its shards.
        gathered: The whole weights of two layers, one running and one on its way, and the gradients of one.
        activations: Those of all micro-batches on their way, at the peak of a backward pass, with buffers of the loss
            and cast weights.
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
        cp: Keys and values, or heads of queries and outputs as well, and their gradients.
        tp: Sums of outputs and of gradients.
        ep: Tokens sent to experts and back, and their gradients.
        pp: States of the stage before, gradients of the stage after, and the gradient of the copied embedding.
    """

    shard: float
    replicate: float
    cp: float
    tp: float
    ep: float
    pp: float


@dataclass(frozen=True)
class Plan:
    """The prediction for one mesh.

    Attributes:
        sizes: The mesh.
        memory: Bytes of a rank; with pipeline stages, of the one with the most.
        traffic: Bytes that a rank receives in a step.
        compute_seconds: Time of the products, mean over ranks.
        step_seconds: Time of an optimizer step.
        tokens_per_day: Tokens of 24 hours of such steps.
        bubble: Fraction of the step in which the mean rank waits for another stage.
        stages: The layers of each stage, by rank of a pipeline.
        memory_by_rank: Bytes of each rank of a pipeline.
    """

    sizes: MeshSizes
    memory: Memory
    traffic: Traffic
    compute_seconds: float
    step_seconds: float
    tokens_per_day: float
    bubble: float
    stages: tuple[tuple[range, ...], ...]
    memory_by_rank: tuple[float, ...]


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
    return _plan(_Model(config), sizes, step, card, efficiency)


@dataclass(frozen=True, eq=False)
class _Model:
    """A model; what meshes have in common is computed once for each object."""

    config: ModelConfig


def _plan(model: _Model, sizes: MeshSizes, step: StepShape, card: Card, efficiency: float) -> Plan:
    _check(model, sizes, step)
    micro_batches = step.rows // sizes.row_ranks // step.micro_batch_rows
    tokens = step.rows * step.sequence_length
    pipeline = _pipeline(model, sizes.pp, sizes.stages_per_rank, step.sequence_length)
    traffics = [_traffic(model, sizes, step, micro_batches, rank) for rank in pipeline]
    flops = _flops(model, step.sequence_length) * (4 / 3 if step.recompute else 1)
    compute = flops * tokens / sizes.ranks / (card.flops * efficiency)
    seconds = []  # in which a rank is busy
    for rank, traffic in zip(pipeline, traffics, strict=True):
        own = compute * sizes.pp * rank.share
        overlapped = max(own, traffic.shard / _bandwidth(card, sizes, "shard"))
        names = ("cp", "tp", "ep", "pp")
        seconds.append(overlapped + sum(getattr(traffic, name) / _bandwidth(card, sizes, name) for name in names))
    sums = max(traffic.replicate for traffic in traffics) / _bandwidth(card, sizes, "replicate")
    step_seconds = pipeline_seconds(seconds, micro_batches, sizes.stages_per_rank) + sums
    memories = [_memory(model, sizes, step, rank, micro_batches) for rank in pipeline]
    return Plan(
        sizes,
        max(memories, key=lambda memory: memory.total),
        Traffic(*(sum(getattr(item, field.name) for item in traffics) / sizes.pp for field in fields(Traffic))),
        compute,
        step_seconds,
        tokens / step_seconds * 86_400,
        1 - (sum(seconds) / sizes.pp + sums) / step_seconds,
        tuple(rank.stages for rank in pipeline),
        tuple(memory.total for memory in memories),
    )


def pipeline_seconds(busy: list[float], micro_batches: int, stages_per_rank: int) -> float:
    """Return the time of a step, given that in which each rank of a pipeline is busy.

    The slowest rank never waits but for the first states and for the last gradients, in which time each other rank runs
    one of its stages on one micro-batch. For equal ranks this is the time of the schedule, otherwise a bound.
    """
    return max(busy) + (sum(busy) - max(busy)) / micro_batches / stages_per_rank


@dataclass(frozen=True)
class _PipelineRank:
    """The part of a model on one rank of a pipeline.

    Attributes:
        number: Its place in the pipeline.
        stages: Indices of the layers of each of its stages.
        is_first: Whether it has the embedding.
        is_last: Whether it has the heads.
        share: Its share of the FLOPs.
    """

    number: int
    stages: tuple[range, ...]
    is_first: bool
    is_last: bool
    share: float

    @functools.cached_property
    def layers(self) -> tuple[int, ...]:
        """Indices of all of its layers."""
        return tuple(index for stage in self.stages for index in stage)


@functools.lru_cache(maxsize=256)
def _flops(model: _Model, sequence_length: int) -> float:
    return training_flops_per_token(model.config, sequence_length)


@functools.lru_cache(maxsize=256)
def _pipeline(model: _Model, pp: int, stages_per_rank: int, sequence_length: int) -> list[_PipelineRank]:
    """Return the ranks of a pipeline."""
    stages = stage_layers(model.config, pp * stages_per_rank, sequence_length=sequence_length)
    *costs, heads = layer_costs(model.config, sequence_length)
    ranks = []
    for number in range(pp):
        own, is_last = stages[number::pp], number == pp - 1
        cost = sum(costs[index] for stage in own for index in stage) + (heads if is_last else 0.0)
        ranks.append(_PipelineRank(number, own, number == 0, is_last, cost / (sum(costs) + heads)))
    return ranks


def search(
    config: ModelConfig, step: StepShape, card: Card, *, num_cards: int, efficiency: float
) -> tuple[list[Plan], list[Plan]]:
    """Return the plans of all meshes of `num_cards` cards, the fastest first: those that fit, and those that do not."""
    plans, model = [], _Model(config)
    most_stages = len(allowed_boundaries(config)) + 1
    for sizes in meshes(num_cards, card.cards_per_node, most_stages=most_stages):
        if sizes.pp > 1 and step.rows < sizes.pp * sizes.row_ranks * step.micro_batch_rows:
            continue  # a rank would mostly wait
        try:
            plans.append(_plan(model, sizes, step, card, efficiency))
        except ConfigError:
            continue
    plans.sort(key=lambda found: found.step_seconds)
    fits = [found.memory.total < 0.9 * card.memory_bytes for found in plans]  # a tenth for the allocator
    return (
        [found for found, is_small in zip(plans, fits, strict=True) if is_small],
        [found for found, is_small in zip(plans, fits, strict=True) if not is_small],
    )


def meshes(num_cards: int, cards_per_node: int, *, most_stages: int = 1) -> Iterator[MeshSizes]:
    """Yield the meshes of `num_cards` cards; tensor-parallel ranks share a machine.

    Args:
        num_cards: Number of cards.
        cards_per_node: Cards of a machine.
        most_stages: Largest number of pipeline stages.
    """
    for pp in _divisors(num_cards):
        if pp > most_stages:
            break
        for sizes in _meshes_of_stage(num_cards // pp, cards_per_node):
            yield replace(sizes, pp=pp)
            if 1 < pp <= most_stages // 2:
                yield replace(sizes, pp=pp, stages_per_rank=2)


def _meshes_of_stage(num_cards: int, cards_per_node: int) -> Iterator[MeshSizes]:
    for tp in _divisors(min(num_cards, cards_per_node)):
        if num_cards % tp:
            continue
        for cp in _divisors(num_cards // tp):
            for dp_shard in _divisors(num_cards // tp // cp):
                for ep in _divisors(dp_shard * cp):
                    yield MeshSizes(num_cards // tp // cp // dp_shard, dp_shard, cp, tp, ep)


@functools.lru_cache(maxsize=256)
def _is_divisible(model: _Model, tp: int) -> bool:
    """Return True. Raises ConfigError if the model cannot be divided among `tp` tensor-parallel ranks."""
    model.config.local(tp=tp)
    return True


def _check(model: _Model, sizes: MeshSizes, step: StepShape) -> None:
    """Raise ConfigError if a mesh does not fit a model or a step."""
    config = model.config
    assert _is_divisible(model, sizes.tp)
    check_exchange(config, step.cp_exchange, cp=sizes.cp, tp=sizes.tp)
    if sizes.pp > 1 and config.tie_embeddings:
        raise ConfigError("a model with tied embeddings cannot be divided into pipeline stages.")
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


_units_of_model = functools.lru_cache(maxsize=256)(lambda model, tp: _units(model.config, tp))


def _units_of(model: _Model, tp: int, rank: _PipelineRank, *, is_divided: bool) -> list[tuple[_Weights, int]]:
    """Return the units of one rank of a pipeline, which `is_divided` if it has several ranks."""
    units, heads, count = _units_of_model(model, tp), model.config.num_mtp_heads, len(model.config.layers)
    if not is_divided:
        return units
    (vocabulary, _), *ends = units[count + heads :]
    own = [units[index] for index in rank.layers]
    if rank.is_first:
        own.append((vocabulary, 2))
    if rank.is_last:
        own += units[count : count + heads]
        own += [(vocabulary, 1 + heads)] * (heads > 0)  # the copy for the MTP heads
        own += ends
    return own


def kept_parameters(config: ModelConfig, sizes: MeshSizes, sequence_length: int = 1) -> float:
    """Return the parameters that a rank keeps, mean over ranks. Stages are divided for a sequence length."""
    model = _Model(config)
    ranks = _pipeline(model, sizes.pp, sizes.stages_per_rank, sequence_length)
    units = [_units_of(model, sizes.tp, rank, is_divided=sizes.pp > 1) for rank in ranks]
    return sum(weights.kept(sizes) for own in units for weights, _ in own) / sizes.pp


def _memory(model: _Model, sizes: MeshSizes, step: StepShape, rank: _PipelineRank, micro_batches: int) -> Memory:
    units = _units_of(model, sizes.tp, rank, is_divided=sizes.pp > 1)
    kept = sum(weights.kept(sizes) for weights, _ in units) * MASTER_BYTES
    largest = max(weights.gathered(sizes) for weights, _ in units) * MASTER_BYTES
    activations = _rank_activations(model, sizes, step, rank, micro_batches)
    return Memory(kept, kept, 2 * kept, 3 * largest, activations)


def _rank_activations(
    model: _Model, sizes: MeshSizes, step: StepShape, rank: _PipelineRank, micro_batches: int
) -> float:
    """Return the bytes of activations on one rank of a pipeline, for all micro-batches on their way."""
    tokens = step.micro_batch_rows * step.sequence_length / sizes.cp
    part = Part(rank.layers, rank.is_last, sizes.tp, sizes.ep)
    found = _bytes_of_part(model, part, step.recompute, step.activation_bytes)
    waiting = _on_their_way(sizes, rank, micro_batches) - 1
    return tokens * (found.device + waiting * found.kept) + found.fixed


@functools.lru_cache(maxsize=1024)
def _bytes_of_part(model: _Model, part: Part, recompute: bool, activation_bytes: int) -> StepBytes:
    return step_bytes(
        model.config, ActivationConfig(), recompute=recompute, activation_bytes=activation_bytes, part=part
    )


def _on_their_way(sizes: MeshSizes, rank: _PipelineRank, micro_batches: int) -> float:
    """Return the micro-batches whose activations a rank keeps at a time; those of one of its stages count in part."""
    after = sizes.pp - 1 - rank.number
    if sizes.stages_per_rank == 1:
        return min(micro_batches, after + 1)
    passes = (sizes.stages_per_rank - 1) * min(sizes.pp, micro_batches) + 2 * after + 1
    return min(passes / sizes.stages_per_rank, micro_batches)


# --- messages --------------------------------------------------------------------------------------------------------


def _traffic(model: _Model, sizes: MeshSizes, step: StepShape, micro_batches: int, rank: _PipelineRank) -> Traffic:
    """Return the bytes that one rank of a pipeline receives."""
    config = model.config
    passes = 3 if step.recompute else 2  # forward, backward, and the forward again
    T = step.micro_batch_rows * step.sequence_length / sizes.cp
    width = T * config.hidden_size * step.activation_bytes
    shard = replicate = 0.0
    for weights, gathers in _units_of(model, sizes.tp, rank, is_divided=sizes.pp > 1):
        plain = (weights.plain + weights.divided / sizes.tp) * MASTER_BYTES
        experts = weights.experts / sizes.ep * MASTER_BYTES
        for size, ranks in ((plain, sizes.weight_ranks), (experts, sizes.weight_ranks // sizes.ep)):
            shard += micro_batches * (gathers + 1) * size * (ranks - 1) / ranks  # gradients are scattered once
            replicate += micro_batches * 2 * size / ranks * (sizes.dp_replicate - 1) / sizes.dp_replicate
    heads = config.num_mtp_heads if rank.is_last else 0
    attention = [*rank.layers, *range(len(config.layers), len(config.layers) + heads)]
    moved = _moved_by_layer(model, sizes.cp, sizes.tp, step)
    cp = sum(moved[index] for index in attention)
    sparse = sum(config.layers[index].ffn == "moe" for index in rank.layers)
    tp = (2 * len(attention) - sparse) * passes * 2 * width * (sizes.tp - 1) / sizes.tp
    tp += _vocabulary_sums(config, sizes, step, rank) * 2 * (sizes.tp - 1) / sizes.tp
    ep = 0.0
    if config.moe is not None:
        choices = width * config.moe.experts_per_token
        ep = sparse * passes * 2 * choices * (sizes.ep - 1) / sizes.ep
    return Traffic(
        shard,
        replicate,
        micro_batches * passes * cp * step.activation_bytes,
        micro_batches * tp,
        micro_batches * ep,
        _states(config, sizes, rank, width * micro_batches),
    )


def _vocabulary_sums(config: ModelConfig, sizes: MeshSizes, step: StepShape, rank: _PipelineRank) -> float:
    """Return the bytes that the tensor-parallel ranks add up for embedding and losses, if a row is one document.

    The embedding sums its outputs, and each loss the gradient of its inputs, and of each label the maximum, the sum and
    the label's logit in float32.
    """
    if sizes.tp == 1:
        return 0.0
    heads, rows = config.num_mtp_heads, step.micro_batch_rows / sizes.cp
    vector = config.hidden_size * step.activation_bytes
    embedded = rank.is_first + heads * rank.is_last
    labels = sum(rows * max(step.sequence_length - 1 - head, 0) for head in range(1 + heads)) * rank.is_last
    return embedded * rows * step.sequence_length * vector + labels * (vector + 3 * 4)


def _states(config: ModelConfig, sizes: MeshSizes, rank: _PipelineRank, width: float) -> float:
    """Return the bytes that a rank receives of other stages, given those of the states of a step."""
    if sizes.pp == 1:
        return 0.0
    received = 2 * sizes.stages_per_rank - rank.is_first - rank.is_last  # states, and gradients of states
    has_copy = config.num_mtp_heads > 0 and (rank.is_first or rank.is_last)
    copy = config.vocab_size / sizes.tp * config.hidden_size / sizes.weight_ranks * MASTER_BYTES if has_copy else 0.0
    return received * width + copy


@functools.lru_cache(maxsize=256)
def _moved_by_layer(model: _Model, cp: int, tp: int, step: StepShape) -> list[float]:
    return [_moved_values(model.config, index, cp, tp, step) for index in range(len(model.config.attention_layers()))]


def _moved_values(config: ModelConfig, index: int, cp: int, tp: int, step: StepShape) -> float:
    """Return the numbers that a rank receives for attention in one layer and micro-batch, mean over ranks."""
    place = config.attention_place(index)
    if cp == 1 or kv_spec(place.spec).source_layer is not None:
        return 0.0
    spec, num_tokens = local_heads(place.spec, tp), step.sequence_length * step.micro_batch_rows
    rows = fetched_rows(place.spec, cp, step.sequence_length, step.micro_batch_rows)
    width = spec.key_dim + spec.value_dim
    shares = head_shares(spec.num_heads, spec.num_kv_heads, cp)
    may_choose = spec.window_keys is None and why_only_keys(place, cp=cp, tp=tp) is None
    if may_choose and exchanges_heads(
        step.cp_exchange, spec.num_heads, spec.num_kv_heads, num_ranks=cp, num_tokens=num_tokens, fetched_rows=rows
    ):
        assert shares is not None
        return moved_heads(shares, num_tokens, cp) * width
    return rows * spec.num_kv_heads * width


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
        fetched += union_length(needed | set(held)) - union_length(set(held))
    return fetched / cp


def _bandwidth(card: Card, sizes: MeshSizes, name: str) -> float:
    """Return the bandwidth of the slowest link of a dimension. The mesh has tp innermost, and pp outermost."""
    span = {
        "tp": sizes.tp,
        "ep": sizes.tp * sizes.ep,
        "cp": sizes.tp * sizes.cp,
        "shard": sizes.tp * sizes.weight_ranks,
        "replicate": sizes.tp * sizes.weight_ranks * sizes.dp_replicate,
        "pp": sizes.ranks,
    }[name]
    return card.node_bytes_per_second if span <= card.cards_per_node else card.network_bytes_per_second
