"""The tables of `openmimo plan`."""

import itertools

from rich.console import Console
from rich.progress import track
from rich.table import Table

from openmimo.core.errors import ConfigError
from openmimo.model.config import ModelConfig
from openmimo.parallel.config import PlanConfig
from openmimo.parallel.head_exchange import check_exchange
from openmimo.parallel.plan import (
    CARDS,
    MASTER_BYTES,
    STATES,
    Card,
    MeshSizes,
    Plan,
    StepShape,
    kept_parameters,
    search,
)
from openmimo.parallel.step_memory import gathered_bytes, longest
from openmimo.parallel.step_memory import options as every_option

_TERA, _GIGA, _KILO = 1e12, 1e9, 1e3


def print_plan(options: PlanConfig, model: ModelConfig, step: StepShape) -> None:
    """Search the meshes, and print the best.

    Args:
        options: The options of the command.
        model: The model of the recipe.
        step: The optimizer step of the recipe's stage.

    Raises:
        ConfigError: No mesh serves.
    """
    console, card = Console(soft_wrap=True), CARDS[options.gpu]
    if options.longest:
        _print_longest(console, options, model, card, step.cp_exchange)
        return
    fitting, others = search(model, step, card, num_cards=options.gpus, efficiency=options.efficiency)
    if not fitting and not others:
        raise ConfigError(
            f"no mesh of {options.gpus} cards divides the model and {step.rows} rows in micro-batches of "
            f"{step.micro_batch_rows}; change --gpus or --micro-batch-size."
        )
    console.print(
        f"{options.gpus} x {options.gpu}, {step.rows} rows of {step.sequence_length:,} tokens a step; products at "
        f"{options.efficiency:.0%} of {card.flops / _TERA:.0f} TFLOP/s (an assumption: --efficiency)."
    )
    shown = (fitting or others)[: options.top]
    if not fitting:
        smallest = min(others, key=lambda found: found.memory.total)
        console.print(
            f"[yellow]no mesh fits[/] into {card.memory_bytes / _GIGA:.0f} GB with a tenth to spare; the smallest "
            f"needs {smallest.memory.total / _GIGA:.0f} GB ({smallest.sizes}). The fastest that would run elsewhere:"
        )
    console.print(_speeds(shown))
    console.print(_parts(shown[0]))
    if shown[0].sizes.pp > 1:
        console.print(_stages(shown[0]))
    if options.dry_run:
        from openmimo.parallel.dry_run import dry_run

        counts = list(
            track(
                dry_run(model, shown[0].sizes, recompute=step.recompute, sequence_length=step.sequence_length),
                total=options.gpus,
                description="building the shards of each rank",
            )
        )
        console.print(
            f"{len(counts)} ranks built on the meta device: {min(counts):,} to {max(counts):,} parameters each, and "
            "the shards of every weight add up to it."
        )


def _print_longest(console: Console, options: PlanConfig, model: ModelConfig, card: Card, cp_exchange: str) -> None:
    """Print the longest row of each option."""
    sizes = MeshSizes(cp=options.gpus)
    check_exchange(model, cp_exchange, cp=sizes.cp, tp=1)
    states = STATES * kept_parameters(model, sizes) * MASTER_BYTES
    if options.gpus > 1:
        states += gathered_bytes(model)
    usable = 0.9 * card.memory_bytes  # a tenth for the allocator
    console.print(
        f"{options.gpus} x {options.gpu}: {usable / _GIGA:.0f} of {card.memory_bytes / _GIGA:.0f} GB a card, of which "
        f"weights, gradients and optimizer take {states / _GIGA:.1f} GB. One row in bfloat16; products at "
        f"{options.efficiency:.0%} of {card.flops / _TERA:.0f} TFLOP/s (an assumption: --efficiency)."
        + (f" All {options.gpus} cards share the tokens of the row (parallel.cp)." if options.gpus > 1 else "")
    )
    table = Table(
        box=None,
        title="the longest row; kept and peak for each of its tokens",
        title_justify="left",
        padding=(0, 1, 0, 0),
    )
    for name in ("recompute", "chunks", "offload", "kept, kB", "peak, kB", "host, GB", "tokens", "step, s"):
        table.add_column(name, justify="left" if name == "recompute" else "right", no_wrap=True)
    for activations, recompute in every_option():
        found = longest(
            model,
            activations,
            recompute=recompute,
            memory_bytes=usable,
            state_bytes=states,
            cp=options.gpus,
            cp_exchange=cp_exchange,
        )
        seconds = found.work / (options.gpus * card.flops * options.efficiency)
        host = found.step.host * found.tokens / options.gpus / _GIGA
        table.add_row(
            activations.recompute if recompute else "nothing",
            str(activations.ffn_chunks),
            "yes" if activations.offload else "",
            f"{found.step.kept / _KILO:,.1f}",
            f"{found.step.device / _KILO:,.1f}",
            f"{host:.1f}" if host else "",
            f"{found.tokens:,}" if found.tokens else "does not fit",
            f"{seconds:,.1f}" if found.tokens else "",
        )
    console.print(table)


def _speeds(plans: list[Plan]) -> Table:
    table = Table(box=None, title="meshes, the fastest first", title_justify="left")
    for name in ("mesh", "memory, GB", "step, s", "products, s", "bubble", "tokens a day"):
        table.add_column(name, justify="left" if name == "mesh" else "right")
    for found in plans:
        table.add_row(
            str(found.sizes),
            f"{found.memory.total / _GIGA:.1f}",
            f"{found.step_seconds:.2f}",
            f"{found.compute_seconds:.2f}",
            f"{found.bubble:.1%}" if found.sizes.pp > 1 else "",
            f"{found.tokens_per_day / _GIGA:,.1f}e9",
        )
    return table


def _parts(best: Plan) -> Table:
    table = Table(box=None, title="one rank of the first mesh", title_justify="left")
    table.add_column("memory, GB")
    table.add_column("", justify="right")
    table.add_column("received in a step, GB")
    table.add_column("", justify="right")
    memory = [(name, value / _GIGA) for name, value in vars(best.memory).items()]
    traffic = [(name, value / _GIGA) for name, value in vars(best.traffic).items()]
    for (part, size), (dimension, moved) in itertools.zip_longest(memory, traffic, fillvalue=("", None)):
        table.add_row(part, "" if size is None else f"{size:.2f}", dimension, f"{moved:.2f}")
    return table


def _stages(best: Plan) -> Table:
    table = Table(box=None, title="pipeline of the first mesh", title_justify="left")
    for name in ("rank", "layers", "memory, GB"):
        table.add_column(name, justify="left" if name == "layers" else "right")
    for rank, (stages, size) in enumerate(zip(best.stages, best.memory_by_rank, strict=True)):
        table.add_row(str(rank), "; ".join(map(_described, stages)), f"{size / _GIGA:.1f}")
    return table


def _described(layers: range) -> str:
    if len(layers) < 2:
        return str(layers[0]) if layers else "heads only"
    return f"{layers[0]} to {layers[-1]}"
