"""Models whose layers have equal bytes in different weight formats, trained with quantization (docs/fairy.md).

    openmimo pretrain low_bits:fairy             # complex weights of 2 bits
    openmimo pretrain low_bits:fairy_plain       # the same with the gate and norms of a real model
    openmimo pretrain low_bits:ternary           # half as many real numbers, of 2 bits
    openmimo pretrain low_bits:binary            # as many real numbers, of 1 bit
    openmimo pretrain low_bits:real              # a sixteenth as many real numbers, in bfloat16
    openmimo pretrain low_bits:fairy_unquantized # the parameters of fairy, not quantized

`--quantization` is the line of a recipe that makes a run quantization-aware.
"""

from dataclasses import replace
from typing import Literal

from openmimo.train.config import EvaluationConfig, Phase, PretrainConfig, TokenizerConfig
from recipes import tiny_cpu

_TOKENIZER = "openmimo/assets/tiny-mimo"
_TEXT = replace(tiny_cpu.TEXT, max_megabytes=2.0)
_STEPS = 300
_PEAK = 3e-3


def fairy() -> PretrainConfig:
    """Fairy+-i: complex weights of the values 1, i, -1 and -i."""
    return _arm("fairy", "bytes_fairy", "fairy")


def fairy_plain() -> PretrainConfig:
    """Fairy+-i with a silu gate and without sub-norms, like the real arms."""
    return _arm("fairy_plain", "bytes_fairy_plain", "fairy")


def fairy_unquantized() -> PretrainConfig:
    """The complex model without quantization."""
    return _arm("fairy_unquantized", "bytes_fairy", "none")


def ternary() -> PretrainConfig:
    """BitNet b1.58: weights of the values -1, 0 and 1."""
    return _arm("ternary", "bytes_ternary", "ternary")


def binary() -> PretrainConfig:
    """Weights of the values -1 and 1, as many real numbers as in `fairy`."""
    return _arm("binary", "bytes_binary", "binary")


def real() -> PretrainConfig:
    """A small model that is not quantized."""
    return _arm("real", "bytes_real", "none")


def two_stages(*, steps: int, peak: float, warmup_steps: int, weight_decay: float) -> tuple[Phase, Phase]:
    """The schedule of BitNet and Fairy+-i: linear decay in two halves, the second without weight decay.

    The first half is on the line from `peak` to 0 over all steps, the second on the line from 0.666 times `peak`.
    """
    first = Phase(
        name="first", steps=steps // 2, sequence_length=128, global_batch_size=8, learning_rate=peak,
        end_learning_rate=peak / 2, warmup_steps=warmup_steps, decay="linear", weight_decay=weight_decay,
        mixture=tiny_cpu.mixture(_TEXT),
    )  # fmt: skip
    second = replace(
        first, name="second", steps=steps - steps // 2, learning_rate=0.333 * peak, end_learning_rate=0.0,
        warmup_steps=0, weight_decay=0.0,
    )  # fmt: skip
    return first, second


def _arm(name: str, model: str, quantization: Literal["none", "fairy", "ternary", "binary"]) -> PretrainConfig:
    return PretrainConfig(
        run_folder=f"runs/low_bits_{name}",
        model=model,
        stages=two_stages(steps=_STEPS, peak=_PEAK, warmup_steps=20, weight_decay=0.1),
        quantization=quantization,
        dtype="float32",
        micro_batch_size=8,
        tokenizer=TokenizerConfig(path=_TOKENIZER),
        evaluation=EvaluationConfig(every_steps=150, batches=16),
    )
