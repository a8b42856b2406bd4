"""A training run of an audio model: setup, resumption, training, the finished model with its audio tokenizer."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from openmimo.core.errors import ConfigError, DataError
from openmimo.core.files import new_folder_atomic
from openmimo.data.tokenizer import Tokenizer
from openmimo.model.audio.audit import is_audio_model
from openmimo.model.audio.language import AudioLanguageModel, load_audio_model
from openmimo.model.audio.language_config import (
    AudioModelConfig,
    audio_model_config,
    with_codebooks,
)
from openmimo.model.audio.sequence import ALL_SPECIAL_TOKENS, AUDIO_TOKENS, SequenceBuilder
from openmimo.model.audio.tokenizer import AudioTokenizer, load_audio_tokenizer
from openmimo.model.hf import CODEC_FOLDER, check_replaceable, load_model
from openmimo.train.audio.config import AudioTrainConfig
from openmimo.train.audio.loader import AudioLoader
from openmimo.train.audio.rows import Codes, Row, SplitRows, read_mixture
from openmimo.train.audio.trainer import AudioTrainer
from openmimo.train.checkpoint import Checkpoints, Progress, restore
from openmimo.train.optim import place_of, total_steps
from openmimo.train.outcome import FREE, has_finished, held_run, use_device, write_outcome, write_report
from openmimo.train.trainer import Alone

_FREE = (*FREE, "loader_workers", "log_every_steps", "codec")
_TRACES = ("checkpoints", "tokenizer", "metrics.jsonl", "model")
_DEFAULT_MODEL = "tiny_audio"


def train_audio(config: AudioTrainConfig, *, console: Console | None = None) -> Path:
    """Run or resume the training of an audio model. Returns the folder of the finished model, `<run_folder>/model`.

    The folder contains the audio tokenizer, so `AudioEngine` reads it as it is.

    Raises:
        UserError: Settings, data or checkpoints do not fit, or the run diverged.
        Interrupted: SIGINT or SIGTERM ended the run after a checkpoint.
    """
    console = console or Console(stderr=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("audio models are trained by one process; start the command without torchrun.")
    folder, codec_folder = Path(config.run_folder), Path(config.codec)
    device = use_device(config)
    codec = load_audio_tokenizer(str(codec_folder), device=str(device))
    checkpoints = Checkpoints(folder, config.checkpoints)
    steps = total_steps(config.stages)
    if has_finished(config, checkpoints, steps=steps, free=_FREE, console=console):
        _check_codec(folder / "model", config.codec)
        _add_codec(folder / "model", codec_folder)
        return folder / "model"
    sources = [read_mixture(stage.mixture) for stage in config.stages]
    described = _described(config, codec)
    _check_weights(config, described)
    check_replaceable(folder / "model")
    growing = (f"stages.{len(config.stages) - 1}.steps",)
    with held_run(config, checkpoints, free=_FREE, growing=growing, traces=_TRACES, console=console) as newest:
        trainer = _open_trainer(config, described, codec, sources, newest, device, console)
        trainer.run()
        model = write_outcome(trainer.model, trainer.tokenizer, checkpoints, folder, write_report, console)
    _add_codec(model, codec_folder)
    return model


def _described(config: AudioTrainConfig, codec: AudioTokenizer) -> AudioModelConfig:
    """Return the geometry of the model, with the codebooks of the audio tokenizer."""
    if config.init_from is not None and config.model is None and is_audio_model(config.init_from):
        given = audio_model_config(config.init_from)
        fitting = with_codebooks(given, codec.config.codebook_sizes)
        if fitting.empty_ids != given.empty_ids:
            raise ConfigError(
                f"init_from {config.init_from!r} has codebooks of {list(given.empty_ids)} codes, but the audio "
                f"tokenizer {config.codec!r} of {list(codec.config.codebook_sizes)}."
            )
        return given
    described = with_codebooks(audio_model_config(config.model or _DEFAULT_MODEL), codec.config.codebook_sizes)
    if config.init_from is not None:
        if is_audio_model(config.init_from):
            raise ConfigError(f"init_from {config.init_from!r} determines the model; leave model out.")
        backbone = load_model(config.init_from).config
        return replace(described, backbone=replace(backbone, mtp=None))
    return described


def _check_weights(config: AudioTrainConfig, described: AudioModelConfig) -> None:
    for stage in config.stages:
        if len(stage.codebook_weights) != described.num_codebooks:
            raise ConfigError(
                f"stage {stage.name!r} has {len(stage.codebook_weights)} codebook_weights, but the model has "
                f"{described.num_codebooks} codebooks."
            )
        if stage.sequence_length > described.backbone.max_positions:
            raise ConfigError(
                f"stage {stage.name!r} has sequence_length {stage.sequence_length}, but the model has "
                f"{described.backbone.max_positions} positions."
            )


def _open_trainer(
    config: AudioTrainConfig,
    described: AudioModelConfig,
    codec: AudioTokenizer,
    sources: list[list[SplitRows]],
    newest: Path | None,
    device: torch.device,
    console: Console,
) -> AudioTrainer:
    """Build the trainer at the newest checkpoint, with the data of the remaining stages."""
    if newest is None:
        tokenizer = _tokenizer(config, described, sources, console)
        model = _initial_model(config, described, device)
        optimizer_tensors, start = None, Progress.beginning()
    else:
        tokenizer = Tokenizer.load(newest)
        model, optimizer_tensors, start = restore(newest, device, load=load_audio_model)
    builder = SequenceBuilder(tokenizer, described)
    fingerprint = _fingerprint(Path(config.codec))
    codes = Codes(Path(config.run_folder) / "codes", codec, fingerprint)
    first = place_of(start.step, config.stages).stage_index
    codes.prepare([clip for stage in sources[first:] for row in _rows(stage) for clip in row.clips()], console)
    loaders = {
        index: AudioLoader(
            sources[index],
            builder,
            codes,
            sequence_length=stage.sequence_length,
            seed=config.seed,
            stage=index,
            identity=fingerprint,
        )
        for index, stage in enumerate(config.stages)
        if index >= first
    }
    return AudioTrainer(
        config,  # type: ignore[arg-type]
        model,
        tokenizer,
        loaders,  # type: ignore[arg-type]
        ranks=Alone(device),
        start=start,
        optimizer_tensors=optimizer_tensors,
        console=console,
    )


def _rows(sources: Iterable[SplitRows]) -> Iterator[Row]:
    return (row for source in sources for row in (*source.train, *source.held_out))


def _tokenizer(
    config: AudioTrainConfig, described: AudioModelConfig, sources: list[list[SplitRows]], console: Console
) -> Tokenizer:
    """Return the text tokenizer: the given one, that of the first model, or one trained on the texts of the rows."""
    if config.tokenizer.path is not None:
        return Tokenizer.load(config.tokenizer.path)
    if config.init_from is not None:
        return Tokenizer.load(config.init_from).with_special_tokens(AUDIO_TOKENS)
    folder = Path(config.run_folder) / "tokenizer"
    if folder.is_dir():
        return Tokenizer.load(folder)
    console.print(f"training a tokenizer of at most {described.backbone.vocab_size} tokens")
    texts = [text for stage in sources for source in stage for row in source.train for text in row.texts()]
    tokenizer = Tokenizer.train(texts, described.backbone.vocab_size, ALL_SPECIAL_TOKENS)
    with new_folder_atomic(folder) as unfinished:
        tokenizer.save(unfinished)
    return tokenizer


def _initial_model(config: AudioTrainConfig, described: AudioModelConfig, device: torch.device) -> AudioLanguageModel:
    if config.init_from is not None and is_audio_model(config.init_from):
        return load_audio_model(config.init_from, "float32", str(device))
    model = AudioLanguageModel(described)
    model.initialize(torch.Generator().manual_seed(config.seed))
    if config.init_from is not None:
        text = load_model(config.init_from)
        weights = {name: value for name, value in text.state_dict().items() if not name.startswith("model.mtp.")}
        model.load_state_dict(model.state_dict() | weights)
    return model.to(device)


def _fingerprint(codec_folder: Path) -> str:
    """Return a hash of the weights and the config of an audio tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(codec_folder.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_codec(model: Path, codec: str) -> None:
    """Refuse another audio tokenizer than that of a finished model."""
    kept = model / CODEC_FOLDER
    if kept.is_dir() and _fingerprint(kept) != _fingerprint(Path(codec)):
        raise ConfigError(
            f"the finished model {model} has another audio tokenizer than codec {codec!r}. Give the codec of the run, "
            "or another run_folder. Commands such as `openmimo audio speak` take a tokenizer of their own."
        )


def _add_codec(model: Path, codec: Path) -> None:
    """Copy the audio tokenizer into the folder of the model."""
    if not (model / CODEC_FOLDER).is_dir():
        try:
            with new_folder_atomic(model / CODEC_FOLDER) as unfinished:
                shutil.copytree(codec, unfinished, dirs_exist_ok=True)
        except OSError as error:
            raise DataError(f"the audio tokenizer could not be copied to {model}: {error}.") from error
