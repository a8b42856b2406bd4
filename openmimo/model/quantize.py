"""Which weights of a model a format covers, and the conversion of a model to it.

int8 covers all linear layers and experts. fp8 covers the matrices that the published checkpoint stores as FP8, on its
blocks. Routers, norms, embeddings and output heads always stay plain.
"""

import math
from collections.abc import Iterator

import torch

from openmimo.core.errors import ConfigError
from openmimo.kernels.weights import FP8_BLOCK, INT8, PLAIN, QuantizedFormat
from openmimo.model.hf_names import is_fp8_in_hub_layout
from openmimo.model.mimo import MiMo
from openmimo.model.weight_formats import QuantizableModule

_QUANTIZED: dict[str, QuantizedFormat] = {"int8": "int8", "fp8": "fp8"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def quantized_format(weights: str) -> QuantizedFormat | None:
    """The option `weights` as a format, None for "plain". Raises ConfigError for an unknown one."""
    if weights == PLAIN:
        return None
    if not isinstance(weights, str) or weights not in _QUANTIZED:
        raise ConfigError(f"weights is {weights!r}; it must be one of {', '.join((PLAIN, *_QUANTIZED))}.")
    return _QUANTIZED[weights]


def allocate_quantized(model: MiMo, weight_format: QuantizedFormat) -> None:
    """Replaces the weights that a format covers by storage without values."""
    for module, name, block in _covered(model, weight_format):
        module.allocate(name, weight_format, block)


@torch.no_grad()
def quantize_model(model: MiMo, weight_format: QuantizedFormat) -> None:
    """Quantizes the weights that a format covers, in place: for inference, not to be saved."""
    for module, name, block in _covered(model, weight_format):
        tensor = getattr(module, name).detach()
        module.allocate(name, weight_format, block)
        module.store(name, tensor)


def _covered(model: MiMo, weight_format: QuantizedFormat) -> Iterator[tuple[QuantizableModule, str, tuple[int, int]]]:
    """Module, name and block size of each weight that a format covers."""
    for module_name, module in model.named_modules():
        if not isinstance(module, QuantizableModule):
            continue
        for name, num_matrices in module.quantizable.items():
            rows, columns = getattr(module, name).shape[-2:]
            if weight_format == INT8:
                yield module, name, (1, columns)
            elif num_matrices > 1 or is_fp8_in_hub_layout(f"{module_name}.{name}"):
                block_rows = _projection_block_rows(model, module_name) if name == "weight" else FP8_BLOCK
                if num_matrices > 1:
                    block_rows = math.gcd(block_rows, rows // num_matrices)
                yield module, name, (block_rows, FP8_BLOCK)


def _projection_block_rows(model: MiMo, name: str) -> int:
    """Rows of an FP8 block of the linear layer `name`.

    A checkpoint may hold q, k and v on grids that begin again at each rank and run across all three (see `fp8`).
    Blocks that divide the rows of each part at a rank have one scale in all of these grids.
    """
    owner, _, own_name = name.rpartition(".")
    if own_name not in _PROJECTIONS:
        return FP8_BLOCK
    attention, ranks = model.get_submodule(owner), model.config.qkv_ranks
    rows = [attention.get_parameter(f"{part}.weight").shape[0] for part in _PROJECTIONS]
    if any(count % ranks for count in rows):
        return FP8_BLOCK
    return math.gcd(FP8_BLOCK, *(count // ranks for count in rows))
