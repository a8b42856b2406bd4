"""Count the checkpoint tensors and the parameters of a model without allocating it."""

from dataclasses import dataclass
from math import prod

from rich.console import Console
from rich.table import Table

from openmimo.model.config import ModelConfig, active_matmul_parameters
from openmimo.model.convert import checkpoint_layout


@dataclass(frozen=True)
class Audit:
    """Counts of a model.

    Attributes:
        shapes: Shape of every checkpoint tensor by name.
        main: Parameters of the main model, selection biases included.
        mtp_block: Parameters of one MTP head; 0 without MTP heads.
        active: Parameters of the main model that are active for one token, output head included.
        num_mtp_heads: Number of MTP heads.
    """

    shapes: dict[str, tuple[int, ...]]
    main: int
    mtp_block: int
    active: int
    num_mtp_heads: int


def audit(config: ModelConfig, *, quantized: bool = False) -> Audit:
    """Count a model on the meta device; with `quantized`, the scales of the published FP8 layout are listed as well."""
    shapes = checkpoint_layout(config, quantized=quantized)
    sizes = {name: prod(shape) for name, shape in shapes.items() if not name.endswith("_scale_inv")}
    mtp = sum(size for name, size in sizes.items() if name.startswith("model.mtp"))
    heads = config.num_mtp_heads
    return Audit(
        shapes=shapes,
        main=sum(sizes.values()) - mtp,
        mtp_block=mtp // heads if heads else 0,
        active=active_matmul_parameters(config),
        num_mtp_heads=heads,
    )


def print_audit(result: Audit, *, list_tensors: bool) -> None:
    """Print the counts, after the name and shape of every tensor if `list_tensors`."""
    if list_tensors:
        for name, shape in sorted(result.shapes.items()):
            print(f"{name}\t{list(shape)}")
    table = Table("what", "count", box=None)
    main_tensors = sum(not name.startswith("model.mtp") for name in result.shapes)
    table.add_row("tensors of the main model", f"{main_tensors:,}")
    table.add_row("tensors of the MTP heads", f"{len(result.shapes) - main_tensors:,}")
    table.add_row("parameters of the main model", f"{result.main:,}")
    table.add_row("of these multiplied with per token", f"{result.active:,}")
    table.add_row(f"parameters of one MTP head (there are {result.num_mtp_heads})", f"{result.mtp_block:,}")
    Console().print(table)
