"""`openmimo rl` and `openmimo mopd` under `torchrun`: one process leads the run, and the others follow its orders."""

import contextlib
from dataclasses import fields
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from openmimo.core.errors import ConfigError
from openmimo.core.sample_files import read_state
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import load_config, load_model
from openmimo.parallel.ranks import Ranks, open_ranks
from openmimo.rl.agents.environment import keep_problem_files, problem_files
from openmimo.rl.config import MopdConfig, RlConfig
from openmimo.rl.loop import RlRun
from openmimo.rl.ranks.lead import Crew, Lead
from openmimo.rl.ranks.member import Member, follow
from openmimo.rl.ranks.orders import Channel
from openmimo.rl.ranks.placement import placement_of, teacher_bytes
from openmimo.rl.report import write_report
from openmimo.rl.run import FREE, GROWING, TRACES, check_start, learned_in
from openmimo.runtime.device import activation_dtype
from openmimo.train.checkpoint import Checkpoints, Progress, restore
from openmimo.train.config import ParallelConfig
from openmimo.train.outcome import has_finished, held_run, use_device, write_outcome

_DIVIDED = ("dp_replicate", "dp_shard", "tp", "ep")  # the dimensions of the mesh that leave samples whole


def _sizes(config: RlConfig) -> dict[str, int]:
    return {name: getattr(config.parallel, name) for name in (*_DIVIDED, "cp")}


def train(config: RlConfig, console: Console) -> Path:
    """As `rl.run.train`, in each of several processes."""
    with open_ranks(use_device(config), _sizes(config)) as ranks:
        _refuse_others(config)  # after the connection, so that one process prints the error
        return _train(config, ranks, console if ranks.is_main else Console(quiet=True))


def _refuse_others(config: RlConfig) -> None:
    if config.rollouts == "processes" and use_device(config).type != "cpu":
        raise ConfigError(
            "rollouts 'processes' starts workers on the accelerators of the other processes of this run; take 'engine' "
            "or 'ray'."
        )
    for field in fields(ParallelConfig):
        if field.name not in _DIVIDED and getattr(config.parallel, field.name) != field.default:
            raise ConfigError(
                f"parallel.{field.name} is {getattr(config.parallel, field.name)}; rl and mopd keep samples whole, and "
                f"divide the model by {', '.join(_DIVIDED)} only. Leave it out."
            )


def _train(config: RlConfig, ranks: Ranks, console: Console) -> Path:
    folder = Path(config.run_folder)
    checkpoints = Checkpoints(folder, config.checkpoints)
    if ranks.on_main(lambda: has_finished(config, checkpoints, steps=config.steps, free=FREE, console=console)):
        return folder / "model"
    tokenizer = ranks.main_first(lambda: check_start(config, folder))
    placement = ranks.on_main(lambda: _placement(config, ranks))
    channel = Channel()
    with contextlib.ExitStack() as held:
        newest = ranks.on_main(
            lambda: held.enter_context(
                held_run(config, checkpoints, free=FREE, growing=GROWING, traces=TRACES, console=console)
            )
        )
        if ranks.is_main:
            keep_problem_files(problem_files(config.sources), folder)
        member, start = ranks.main_first(lambda: _open(config, tokenizer, ranks, newest, placement, console))
        row_ranks: list[int] = [0] * channel.count
        dist.all_gather_object(row_ranks, ranks.row_rank)
        if not ranks.is_main:
            follow(member, channel)
            return folder / "model"
        crew = Crew(member, channel, row_ranks)
        try:
            lead = Lead(crew)
            run = RlRun(config, member.learner.model, tokenizer, start=start, console=console, learner=lead)
            run.run()
            model, _ = lead.saved(with_optimizer=False)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the connection may be lost; the error above says why
                crew.end(has_failed=True)
            raise
        crew.end(has_failed=False)
        written = write_outcome(model, tokenizer, checkpoints, folder, write_report, console)
        console.print(learned_in(config, folder), highlight=False)
        return written


def _placement(config: RlConfig, ranks: Ranks) -> str:
    """Return the placement of the teachers. Raises ConfigError if the mesh does not divide a model that it divides."""
    ranks.check(load_config(config.checkpoint))
    placement = placement_of(config, ranks.device, dist.get_world_size())
    if isinstance(config, MopdConfig) and placement == "sharded":
        for folder in teacher_bytes(config):
            ranks.check(load_config(folder))
    return placement


def _open(
    config: RlConfig, tokenizer: Tokenizer, ranks: Ranks, newest: Path | None, placement: str, console: Console
) -> tuple[Member, Progress]:
    """Load the newest checkpoint, or the one of the config, and distribute it."""
    if newest is None:
        model = load_model(config.checkpoint, dtype="float32", device=str(ranks.device))
        start, optimizer_tensors = Progress.beginning(), None
    else:
        model, optimizer_tensors, start = restore(newest, ranks.device, read_state=read_state)
    model.compute_dtype = activation_dtype(config.dtype, ranks.device)
    member = Member(
        config,
        model,
        tokenizer,
        ranks,
        start=start,
        optimizer_tensors=optimizer_tensors,
        placement=placement,
        console=console,
    )
    return member, start
