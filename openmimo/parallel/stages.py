"""The layers of each pipeline stage, without torch.

The layers are divided so that the slowest stage is as fast as possible. The cost of a layer is that of its products and
attention at a sequence length; the last stage also has the output head and the MTP heads. A layer that reads the keys
of an earlier one is in the same stage, because only states pass from one stage to the next.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from openmimo.core.errors import ConfigError
from openmimo.model.config import (
    ModelConfig,
    attention_flops_per_token,
    layer_multiplications,
    mtp_matmul_parameters,
)


@dataclass(frozen=True)
class PipelineOptions:
    """How a model is divided into stages, and in which order they run.

    Attributes:
        schedule: "1f1b" (one stage a process) or "interleaved".
        stages: Number of stages; stage s is on process s modulo the processes of the pipeline.
        boundaries: First layer of every stage after the first (empty: by cost).
        sequence_length: Tokens of a row, for the cost of attention.
    """

    schedule: str
    stages: int
    boundaries: tuple[int, ...]
    sequence_length: int


def stage_layers(
    config: ModelConfig, num_stages: int, *, sequence_length: int, boundaries: Sequence[int] = ()
) -> tuple[range, ...]:
    """Return the layers of each stage. The last stage may have none, only the heads.

    Args:
        config: The model.
        num_stages: Number of stages.
        sequence_length: Tokens of a row, for the cost of attention.
        boundaries: First layer of every stage after the first (empty: by cost).

    Raises:
        ConfigError: The model cannot be divided like this.
    """
    count = len(config.layers)
    allowed = allowed_boundaries(config)
    if boundaries:
        _check_boundaries(boundaries, num_stages, allowed, config)
    elif num_stages > len(allowed) + 1:
        raise ConfigError(
            f"{num_stages} pipeline stages are too many: the {count} layers can be divided at {len(allowed)} places, "
            "because layers with common keys stay together. Lower parallel.pp or parallel.pp_stages."
        )
    else:
        boundaries = _balanced(layer_costs(config, sequence_length), tuple(allowed), num_stages)
    edges = [0, *boundaries, count]
    return tuple(range(start, stop) for start, stop in zip(edges, edges[1:], strict=False))


def allowed_boundaries(config: ModelConfig) -> list[int]:
    """Return the layers that may be the first of a stage; the number of layers stands for a stage of heads only."""
    count = len(config.layers)
    return [
        start
        for start in range(1, count + 1)
        if all(layer.attention.kv_from is None or layer.attention.kv_from >= start for layer in config.layers[start:])
    ]


def layer_costs(config: ModelConfig, sequence_length: int) -> tuple[float, ...]:
    """Return the forward FLOPs of a token in each layer, and at the end those of the output head and the MTP heads."""
    layers = [
        2 * layer_multiplications(config, index) + attention_flops_per_token(layer.attention, sequence_length)
        for index, layer in enumerate(config.layers)
    ]
    heads = 2.0 * (config.hidden_size * config.vocab_size + mtp_matmul_parameters(config))
    if config.mtp is not None:
        heads += config.mtp.num_layers * attention_flops_per_token(config.mtp.attention, sequence_length)
    return (*layers, heads)


def _check_boundaries(boundaries: Sequence[int], num_stages: int, allowed: list[int], config: ModelConfig) -> None:
    if len(boundaries) != num_stages - 1 or sorted(set(boundaries)) != list(boundaries):
        raise ConfigError(
            f"parallel.pp_boundaries is {', '.join(map(str, boundaries))}; give the first layers of the "
            f"{num_stages - 1} stages after the first, in increasing order."
        )
    for start in boundaries:
        if not 0 < start <= len(config.layers):
            raise ConfigError(f"parallel.pp_boundaries has {start}, but the layers are 0 to {len(config.layers) - 1}.")
        if start not in allowed:
            raise ConfigError(
                f"parallel.pp_boundaries has {start}, but a layer from there on reads the keys of an earlier one, and "
                f"both must be in one stage. Possible boundaries: {', '.join(map(str, allowed))}."
            )


@functools.lru_cache(maxsize=256)
def _balanced(costs: tuple[float, ...], allowed: tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """Return the boundaries with the smallest cost of the most expensive stage, then the most equal costs.

    `costs` has one entry more than there are layers; it belongs to the last stage.
    """
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    # for each end of the stages so far: (largest cost, sum of squares, boundaries)
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for _ in range(num_stages - 1):
        extended: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for start, (largest, squares, boundaries) in best.items():
            for end in allowed:
                if end > start:
                    cost = before[end] - before[start]
                    found = (max(largest, cost), squares + cost**2, (*boundaries, end))
                    extended[end] = min(extended.get(end, found), found)
        best = extended
    whole = [
        (max(largest, before[-1] - before[start]), squares + (before[-1] - before[start]) ** 2, boundaries)
        for start, (largest, squares, boundaries) in best.items()
    ]
    return min(whole)[2]
