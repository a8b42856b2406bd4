"""`openmimo pretrain`, `extend` and `sft`: set a run up, find where it stopped, train, report."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from openmimo.core import config as config_io
from openmimo.core.errors import ConfigError
from openmimo.data.config import without_paths
from openmimo.data.source import TextSource, open_source, training_documents
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.config import ModelConfig
from openmimo.model.hf import load_config, load_model, save_model
from openmimo.model.mimo import MiMo
from openmimo.model.presets import model_config
from openmimo.runtime.device import resolve_device
from openmimo.train.checkpoint import Checkpoints, Progress, restore
from openmimo.train.config import ExtendConfig, PretrainConfig, SftConfig
from openmimo.train.report import write_report
from openmimo.train.trainer import Trainer, without_location


def pretrain(config: PretrainConfig, *, console: Console | None = None) -> Path:
    """Runs or resumes a pre-training run. Returns the folder of the finished model, `<run_folder>/model`."""
    console = console or Console(stderr=True)
    run_folder = Path(config.run_folder)
    device = resolve_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    _check_start(config)
    _keep_config(config, run_folder)
    newest = Checkpoints(run_folder, config.checkpoints).newest_intact()
    if newest is None:
        tokenizer = _tokenizer(config, run_folder, console)
        model = _new_model(config, tokenizer, device)
        trainer = Trainer(config, model, tokenizer, device=device, start=Progress.beginning(), console=console)
    else:
        console.print(f"going on from {newest}")
        model, optimiser_tensors, progress = restore(newest, device)
        trainer = Trainer(
            config,
            model,
            Tokenizer.load(newest),
            device=device,
            start=progress,
            optimiser_tensors=optimiser_tensors,
            console=console,
        )
    trainer.run()
    model_folder = run_folder / "model"
    save_model(trainer.model, model_folder, tokenizer=trainer.tokenizer)
    report = write_report(run_folder)
    console.print(f"model   {model_folder}\nreport  {report}")
    return model_folder


def extend(config: ExtendConfig, *, console: Console | None = None) -> Path:
    """Runs or resumes a context extension. Returns the folder of the finished model."""
    return pretrain(config.as_pretraining(), console=console)


def sft(config: SftConfig, *, console: Console | None = None) -> Path:
    """Runs or resumes supervised fine-tuning. Returns the folder of the finished model."""
    return pretrain(config.as_pretraining(), console=console)


def _check_start(config: PretrainConfig) -> None:
    """Refuses a model, a checkpoint or a source that is not there, before anything is written."""
    described = load_config(config.init_from) if config.init_from else model_config(config.model)
    if config.init_from is not None and config.tokenizer.path is None:
        Tokenizer.load(Path(config.init_from))
    heads = described.num_mtp_heads
    for stage in config.stages:
        if stage.mtp_heads is not None and (heads == 0 or stage.mtp_heads < heads):
            raise ConfigError(f"stage {stage.name!r} asks for {stage.mtp_heads} MTP heads of a model with {heads}.")
        heads = stage.mtp_heads or heads
        for source in stage.mixture.sources:
            open_source(source)


def _keep_config(config: PretrainConfig, run_folder: Path) -> None:
    """Saves the config in the run folder; refuses to go on with a run that was started with another one."""
    path = run_folder / "config.json"
    if path.exists() and (run_folder / "checkpoints").exists():
        # The loader compares what data files hold, which may lie elsewhere now.
        before = without_paths(config_io.to_dict(without_location(config_io.load(PretrainConfig, path))))
        now = without_paths(config_io.to_dict(without_location(config)))
        changed = [name for name in now if now[name] != before[name]]
        if changed:
            raise ConfigError(
                f"{run_folder} holds a run with another {', '.join(changed)}. Name another run_folder for a new run, "
                f"or repeat the old one with: openmimo pretrain --from {path}."
            )
    run_folder.mkdir(parents=True, exist_ok=True)
    config_io.save(config, path)


def _tokenizer(config: PretrainConfig, run_folder: Path, console: Console) -> Tokenizer:
    folder = config.tokenizer.path or config.init_from
    if folder is not None:
        return Tokenizer.load(Path(folder))
    own = run_folder / "tokenizer"
    if own.exists():
        return Tokenizer.load(own)
    vocab_size = model_config(config.model).vocab_size
    console.print(f"training a tokenizer of {vocab_size} tokens")
    tokenizer = Tokenizer.train(_training_text(config), vocab_size)
    tokenizer.save(own)
    return tokenizer


def _training_text(config: PretrainConfig) -> Iterator[str]:
    """Text for a tokenizer, from the first stage that has any: each source gives its share of the megabytes."""
    for stage in config.stages:
        sources = [source for source in stage.mixture.sources if isinstance(open_source(source)[0], TextSource)]
        if sources:
            break
    else:
        raise ConfigError("no stage has a source of text to train a tokenizer on; name one as tokenizer.path.")
    total_weight = sum(source.weight for source in sources)
    for source in sources:
        megabytes = config.tokenizer.train_megabytes * source.weight / total_weight
        yield from training_documents(replace(source, max_megabytes=megabytes), stage.mixture.validation_fraction)


def _new_model(config: PretrainConfig, tokenizer: Tokenizer, device: torch.device) -> MiMo:
    described = load_config(config.init_from) if config.init_from else model_config(config.model)
    if tokenizer.vocab_size > described.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but {config.init_from or config.model!r} has vocab_size "
            f"{described.vocab_size}."
        )
    if config.init_from is not None:
        model = load_model(config.init_from, dtype="float32", device=str(device))
        if config.tokenizer.path is not None:  # the ids in config.json are those of the tokenizer that is left behind
            model.config = _with_token_ids(model.config, tokenizer)
        return model
    model = MiMo(_with_token_ids(described, tokenizer))
    model.initialise(torch.Generator().manual_seed(config.seed))
    return model.to(device)


def _with_token_ids(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    ids = {"bos_token_id": None, "eos_token_id": list(tokenizer.eos_token_ids), "pad_token_id": tokenizer.pad_id}
    return replace(model, token_ids=ids)
