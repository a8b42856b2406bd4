"""`openmimo pretrain`, `extend` and `sft`: setup, resumption, training and report of a run."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from openmimo.core import config as config_io
from openmimo.core.config import check_same_run
from openmimo.core.errors import ConfigError
from openmimo.core.files import new_folder_atomic
from openmimo.core.registry import load_object
from openmimo.data.config import SourceConfig
from openmimo.data.loader import Loader
from openmimo.data.source import TextSource, open_source, training_documents
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.config import ModelConfig
from openmimo.model.hf import check_replaceable, load_config
from openmimo.model.mimo import MiMo
from openmimo.model.presets import model_config
from openmimo.train import outcome
from openmimo.train.checkpoint import Checkpoints, Progress, restore
from openmimo.train.config import ExtendConfig, PretrainConfig, SftConfig
from openmimo.train.optim import place_of, rows_of_step, total_steps
from openmimo.train.outcome import has_finished, held_run, use_device, write_outcome, write_report
from openmimo.train.trainer import Alone, Trainer

# The paths of the data may change, because the loader compares the content.
FREE = (*outcome.FREE, "loader_workers", "log_every_steps", "expert_trace")
TRACES = ("checkpoints", "tokenizer", "metrics.jsonl", "model")
_TRAINED_ON = "trained_on.json"
_DEFAULT_MODEL = "tiny"


def pretrain(config: PretrainConfig, *, console: Console | None = None) -> Path:
    """Run or resume pre-training. Returns the folder of the finished model, `<run_folder>/model`.

    Raises:
        UserError: Settings, data or checkpoints do not fit, or the run diverged.
        Interrupted: SIGINT or SIGTERM ended the run after a checkpoint.
    """
    console = console or Console(stderr=True)
    with open_ranks(config) as ranks:
        return _pretrain(config, ranks, console if ranks.is_main else Console(quiet=True))


@contextmanager
def open_ranks(config: PretrainConfig) -> Iterator[Alone]:
    """Yield the part of this process in the run: all of it, or one of the processes that `torchrun` has started.

    Raises:
        ConfigError: The config's mesh does not fit the number of processes.
    """
    device, sizes = use_device(config), config.parallel.sizes
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        pipeline = config.parallel.pipeline(config.stages[0].sequence_length)
        open_parallel = load_object("openmimo.parallel.ranks:open_ranks")
        writes_shards, cp_exchange = config.parallel.checkpoints == "shards", config.parallel.cp_exchange
        with open_parallel(device, sizes, pipeline, writes_shards=writes_shards, cp_exchange=cp_exchange) as ranks:
            yield ranks
        return
    if any(size > 1 for size in sizes.values()):
        raise ConfigError(
            f"parallel asks for several processes ({', '.join(f'{name} {size}' for name, size in sizes.items())}), but "
            "this is one; start the command with torchrun --nproc-per-node N -m openmimo ...."
        )
    if config.parallel.checkpoints != "shards":
        raise ConfigError(
            f"parallel.checkpoints {config.parallel.checkpoints} has no effect in one process, which always writes "
            "whole files; leave it out."
        )
    yield Alone(device)


def _pretrain(config: PretrainConfig, ranks: Alone, console: Console) -> Path:
    folder = Path(config.run_folder)
    checkpoints = Checkpoints(folder, config.checkpoints)
    steps = total_steps(config.stages)
    if ranks.on_main(lambda: has_finished(config, checkpoints, steps=steps, free=FREE, console=console)):
        return folder / "model"
    prepared = ranks.main_first(lambda: _check_start(config, checkpoints, ranks))
    with contextlib.ExitStack() as held:
        newest = ranks.on_main(
            lambda: held.enter_context(
                held_run(config, checkpoints, free=FREE, growing=growing(config), traces=TRACES, console=console)
            )
        )
        trainer = _open_trainer(config, prepared, newest, ranks, console)
        trainer.run()
        return ranks.export(
            trainer.model,
            lambda entries: write_outcome(
                trainer.model, trainer.tokenizer, checkpoints, folder, write_report, console, entries=entries
            ),
        )


def growing(config: PretrainConfig) -> tuple[str, ...]:
    """The settings that may rise when a run continues: the steps of its last stage."""
    return (f"stages.{len(config.stages) - 1}.steps",)


def extend(config: ExtendConfig, *, console: Console | None = None) -> Path:
    """Run or resume a context extension. Returns the folder of the finished model."""
    return pretrain(config.as_pretraining(), console=console)


def sft(config: SftConfig, *, console: Console | None = None) -> Path:
    """Run or resume supervised fine-tuning. Returns the folder of the finished model."""
    return pretrain(config.as_pretraining(), console=console)


@dataclass(frozen=True)
class _Prepared:
    """Objects that the check before a new run has opened; None if it could not open them yet."""

    model: MiMo | None = None
    loaders: dict[int, Loader] | None = None


def _check_start(config: PretrainConfig, checkpoints: Checkpoints, ranks: Alone) -> _Prepared:
    """Check that everything a run needs exists and fits, before any file is written."""
    folder = Path(config.run_folder)
    if (folder / "config.json").exists() and any((folder / name).exists() for name in TRACES):
        check_same_run(config, folder / "config.json", free=FREE, growing=growing(config))
    check_replaceable(folder / "model")
    described = _described(config)
    tokenizer = _given_tokenizer(config)
    ranks.check(described, trained_as=_trained_as(config))
    _check_steps(config, described, checkpoints, ranks)
    _check_heads(config, described)
    _check_quantization(config, described)
    _check_experts(config, described, ranks)
    if config.expert_trace and described.moe is None:
        raise ConfigError("expert_trace has no effect on a model without experts; leave it out (--no-expert-trace).")
    _check_placement(config, described)
    for stage in config.stages:
        for source in stage.mixture.sources:
            plugin, options = open_source(source)
            if isinstance(plugin, TextSource):
                plugin.fingerprint(options)
    if tokenizer is None:
        _text_sources(config)
        return _Prepared()
    _check_vocabulary(config, tokenizer, described)
    if checkpoints.newest() is not None:
        return _Prepared()
    model = _initial_model(config, tokenizer, ranks) if config.init_from else None
    return _Prepared(model, _open_loaders(config, tokenizer, ranks))


def _trained_as(config: PretrainConfig) -> str | None:
    if config.quantization != "none":
        return config.quantization
    return "fp8" if config.fp8 else None


def _check_steps(config: PretrainConfig, described: ModelConfig, checkpoints: Checkpoints, ranks: Alone) -> None:
    """Raise ConfigError if the processes cannot share the rows of every step that is left, or cannot add heads."""
    newest = checkpoints.newest_step() or 0
    first, heads = place_of(newest, config.stages).stage_index, described.num_mtp_heads
    for index, stage in enumerate(config.stages):
        if index > first and stage.mtp_heads is not None and stage.mtp_heads > heads:
            ranks.check_growth()
        heads = stage.mtp_heads or heads
        if index >= first:
            steps = range(min(stage.steps, stage.batch_warmup_steps + 1))
            for rows in sorted({rows_of_step(stage, step) for step in steps}):
                ranks.rows(rows)


def _check_heads(config: PretrainConfig, described: ModelConfig) -> None:
    heads = described.num_mtp_heads
    for stage in config.stages:
        if stage.mtp_heads is not None and (heads == 0 or stage.mtp_heads < heads):
            raise ConfigError(f"stage {stage.name!r} has mtp_heads {stage.mtp_heads}, but the model has {heads}.")
        heads = stage.mtp_heads or heads


def _check_quantization(config: PretrainConfig, described: ModelConfig) -> None:
    if config.fp8 and described.complex_layers is not None:
        raise ConfigError("fp8 is for models with real weights, but this one has complex layers; leave it out.")
    needed = {"fairy": True, "fairy2i": False}.get(config.quantization)
    if needed not in (None, described.complex_layers is not None):
        numbers, others = ("complex", "real") if needed else ("real", "complex")
        raise ConfigError(
            f"quantization {config.quantization!r} is for {numbers} weights, but the model has {others} ones."
        )


def _check_experts(config: PretrainConfig, described: ModelConfig, ranks: Alone) -> None:
    settings = {
        "expert_step": config.expert_step.is_used,
        "z_weight": config.z_weight > 0,
        "balance_over": config.balance_over == "batch",
    }
    used = [name for name, is_used in settings.items() if is_used]
    if used and described.moe is None:
        raise ConfigError(f"{', '.join(used)}: no effect on a model without experts; leave it out.")
    if config.expert_step.is_used and not isinstance(ranks, Alone):
        raise ConfigError(
            "expert_step works on one device, because a process of several holds parts of experts; leave it out."
        )


def _check_placement(config: PretrainConfig, described: ModelConfig) -> None:
    source = config.parallel.expert_placement
    if source != "off" and all(layer.ffn != "moe" for layer in described.layers):
        raise ConfigError("parallel.expert_placement has no effect on a model without sparse layers; set it to off.")
    if source == "forecast" and not config.expert_trace:
        raise ConfigError("parallel.expert_placement forecast reads the recorded load; add --expert-trace.")
    if source not in ("off", "forecast"):
        load_object("openmimo.parallel.expert_placement:read_placement")(source, described)


def _described(config: PretrainConfig) -> ModelConfig:
    return load_config(config.init_from) if config.init_from else model_config(config.model or _DEFAULT_MODEL)


def _given_tokenizer(config: PretrainConfig) -> Tokenizer | None:
    """Return the tokenizer in the config; None if the run trains one."""
    folder = config.tokenizer.path or config.init_from
    return None if folder is None else Tokenizer.load(Path(folder))


def _check_vocabulary(config: PretrainConfig, tokenizer: Tokenizer, described: ModelConfig) -> None:
    if tokenizer.vocab_size > described.vocab_size:
        name = config.init_from or config.model or _DEFAULT_MODEL
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but {name!r} has vocab_size {described.vocab_size}."
        )


def _open_trainer(
    config: PretrainConfig, prepared: _Prepared, newest: Path | None, ranks: Alone, console: Console
) -> Trainer:
    """Build the trainer of a run at its newest intact checkpoint, with the data of the remaining stages."""
    if newest is None:
        tokenizer = _given_tokenizer(config) or ranks.main_first(lambda: _own_tokenizer(config, console))
        model = prepared.model or _initial_model(config, tokenizer, ranks)
        optimizer_tensors: Mapping[str, Any] = {}
        start = Progress.beginning()
    else:
        tokenizer = Tokenizer.load(newest)
        model, optimizer_tensors, start = _restored(newest, ranks)
    first_stage = place_of(start.step, config.stages).stage_index
    loaders = prepared.loaders or ranks.main_first(lambda: _open_loaders(config, tokenizer, ranks, first_stage))
    return Trainer(
        config,
        model,
        tokenizer,
        loaders,
        ranks=ranks,
        start=start,
        optimizer_tensors=optimizer_tensors,
        console=console,
    )


def _open_loaders(
    config: PretrainConfig, tokenizer: Tokenizer, ranks: Alone, first_stage: int = 0
) -> dict[int, Loader]:
    """Open and tokenize the data of each stage from `first_stage` on, and check the held-out part. Raises UserError."""
    loaders = {}
    for index, stage in enumerate(config.stages[first_stage:], start=first_stage):
        loader = Loader(
            stage.mixture,
            tokenizer,
            sequence_length=stage.sequence_length,
            seed=config.seed,
            stage=index,
            rank=ranks.row_rank,
            world_size=ranks.num_row_ranks,
            num_workers=config.loader_workers,
        )
        if stage.mixture.validation_fraction > 0.0:
            next(loader.fixed_batches(1, 1))
        loaders[index] = loader
    return loaders


def _own_tokenizer(config: PretrainConfig, console: Console) -> Tokenizer:
    """Train the run's tokenizer. A tokenizer of an earlier start is reused if its training text is the same."""
    folder = Path(config.run_folder) / "tokenizer"
    trained_on = _identity_of_text(config)
    if (folder / _TRAINED_ON).exists() and (folder / _TRAINED_ON).read_text() == trained_on:
        return Tokenizer.load(folder)
    vocab_size = _described(config).vocab_size
    console.print(f"training a tokenizer of {vocab_size} tokens")
    tokenizer = Tokenizer.train(_training_text(config), vocab_size)
    with new_folder_atomic(folder) as unfinished:
        tokenizer.save(unfinished)
        (unfinished / _TRAINED_ON).write_text(trained_on)
    return tokenizer


def _text_sources(config: PretrainConfig) -> tuple[list[SourceConfig], float]:
    """Return the sources of the tokenizer's training text, with their sizes, and their validation fraction.

    They are the text sources of the first stage that has any. Raises ConfigError if no stage has any.
    """
    for stage in config.stages:
        sources = [source for source in stage.mixture.sources if isinstance(open_source(source)[0], TextSource)]
        if sources:
            break
    else:
        raise ConfigError("no stage has a text source to train a tokenizer on; set tokenizer.path.")
    per_weight = config.tokenizer.train_megabytes / sum(source.weight for source in sources)
    cut = [replace(source, max_megabytes=per_weight * source.weight) for source in sources]
    return cut, stage.mixture.validation_fraction


def _training_text(config: PretrainConfig) -> Iterator[str]:
    sources, validation_fraction = _text_sources(config)
    for source in sources:
        yield from training_documents(source, validation_fraction)


def _identity_of_text(config: PretrainConfig) -> str:
    """Return a hash that changes with the tokenizer's training text and vocabulary size."""
    sources, validation_fraction = _text_sources(config)
    described = [[config_io.to_dict(source), _fingerprint(source)] for source in sources]
    parts = [described, validation_fraction, _described(config).vocab_size]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest() + "\n"


def _fingerprint(source: SourceConfig) -> str:
    plugin, options = open_source(source)
    assert isinstance(plugin, TextSource)
    return plugin.fingerprint(options)


def _restored(path: Path, ranks: Alone) -> tuple[MiMo, Mapping[str, Any], Progress]:
    if isinstance(ranks, Alone):
        return restore(path, ranks.device)
    return load_object("openmimo.train.sharded:restore_local")(path, ranks)


def _initial_model(config: PretrainConfig, tokenizer: Tokenizer, ranks: Alone) -> MiMo:
    described = _described(config)
    _check_vocabulary(config, tokenizer, described)
    if config.init_from is not None:
        model = ranks.load(config.init_from)
        if config.tokenizer.path is not None:
            model.config = _with_token_ids(model.config, tokenizer)
        return model
    return ranks.draw(_with_token_ids(described, tokenizer), config.seed)


def _with_token_ids(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    ids = {"bos_token_id": None, "eos_token_id": list(tokenizer.eos_token_ids), "pad_token_id": tokenizer.pad_id}
    return replace(model, token_ids=ids)
