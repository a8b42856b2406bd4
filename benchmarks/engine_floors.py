"""Lower bounds of step times on this machine, from bytes at measured bandwidth and products at a measured rate."""

import time
from dataclasses import dataclass

import torch

from openmimo.model.attention import kv_spec
from openmimo.model.config import ModelConfig, active_matmul_parameters, attention_flops_per_token, attention_parameters
from openmimo.runtime.device import measured_matmul_flops

CPU = torch.device("cpu")
_READ_BYTES = 1 << 29  # much larger than the caches
_BFLOAT16_BYTES, _FLOAT32_BYTES = 2, 4


@dataclass(frozen=True)
class Machine:
    """Measured rates of this machine with the current number of torch threads.

    Attributes:
        read_bytes_per_second: Memory bandwidth of reads.
        flops_per_second: The larger rate of matrix products in bfloat16 and float32.
    """

    read_bytes_per_second: float
    flops_per_second: float

    @classmethod
    def measured(cls) -> "Machine":
        """Measures this machine, in a few seconds."""
        rates = [measured_matmul_flops(CPU, dtype) for dtype in (torch.bfloat16, torch.float32)]
        return cls(_read_bytes_per_second(), max(rates))


def decode_floor_ms(machine: Machine, config: ModelConfig, *, batch_size: int, context: int) -> float:
    """Returns the longer of the time to read all needed weights and cached keys once and the time of the products."""
    step_bytes = _weight_bytes(config, batch_size) + batch_size * _cache_bytes(config, context)
    step_flops = batch_size * 2 * active_matmul_parameters(config)
    return 1e3 * max(step_bytes / machine.read_bytes_per_second, step_flops / machine.flops_per_second)


def prefill_floor_ms(machine: Machine, config: ModelConfig, length: int) -> float:
    """Returns the time of the products of a prompt, of which only the last token uses the output head."""
    head = config.hidden_size * config.vocab_size
    matmul = 2 * (length * (active_matmul_parameters(config) - head) + head)
    attention = length * sum(attention_flops_per_token(layer.attention, length) for layer in config.layers)
    return 1e3 * (matmul + attention) / machine.flops_per_second


def _weight_bytes(config: ModelConfig, num_tokens: int) -> float:
    """Returns the bytes of weights that the main model reads. Assumes that tokens choose experts uniformly."""
    D, moe = config.hidden_size, config.moe
    unique_experts = moe.num_experts * (1 - (1 - moe.experts_per_token / moe.num_experts) ** num_tokens)
    total = _BFLOAT16_BYTES * D * config.vocab_size
    for index, layer in enumerate(config.layers):
        total += _BFLOAT16_BYTES * attention_parameters(config, index)
        if layer.ffn == "dense":
            total += _BFLOAT16_BYTES * 3 * D * config.dense_ffn_dim
        else:
            total += _FLOAT32_BYTES * D * moe.num_experts + _BFLOAT16_BYTES * unique_experts * 3 * D * moe.expert_dim
    return total


def _cache_bytes(config: ModelConfig, context: int) -> int:
    total = 0
    for spec in (kv_spec(layer.attention) for layer in config.layers):
        kept = context if spec.keep_positions is None else min(context, spec.keep_positions)
        total += kept * spec.bytes_per_position(_BFLOAT16_BYTES)
    return total


def _read_bytes_per_second() -> float:
    """Returns the best rate of two ways to read a large array, several times each."""
    columns = 1 << 14
    x = torch.ones(_READ_BYTES // _FLOAT32_BYTES // columns, columns)
    vector = torch.ones(columns)
    best = float("inf")
    for _ in range(5):
        for read in (x.sum, lambda: x.mv(vector)):
            start = time.perf_counter()
            read()
            best = min(best, time.perf_counter() - start)
    return _READ_BYTES / best
