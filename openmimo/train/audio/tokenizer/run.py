"""Training of an audio tokenizer: setup, resumption, training, outcome and report of a run."""

from pathlib import Path

import torch
from rich.console import Console

from openmimo.core.config import check_same_run
from openmimo.model.audio.config import preset
from openmimo.model.audio.tokenizer import AudioTokenizer, load_audio_tokenizer, save_audio_tokenizer
from openmimo.model.hf import check_replaceable
from openmimo.train import outcome
from openmimo.train.audio.tokenizer.clips import open_clips
from openmimo.train.audio.tokenizer.config import AudioTokenizerTrainConfig
from openmimo.train.audio.tokenizer.report import write_report
from openmimo.train.audio.tokenizer.trainer import Trainer
from openmimo.train.checkpoint import Checkpoints, find_damage
from openmimo.train.outcome import held_run, use_device

FREE = (*outcome.FREE, "corpus", "log_every_steps", "evaluate_every_steps", "evaluation_clips")
TRACES = ("checkpoints", "metrics.jsonl", "model")


def train_tokenizer(config: AudioTokenizerTrainConfig, *, console: Console | None = None) -> Path:
    """Run or resume the training of a tokenizer. Returns the folder of the finished tokenizer, `<run_folder>/model`.

    Raises:
        UserError: Settings, data or checkpoints do not fit, or the run diverged.
        Interrupted: SIGINT or SIGTERM ended the run after a checkpoint.
    """
    console = console or Console(stderr=True)
    folder = Path(config.run_folder)
    checkpoints = Checkpoints(folder, config.checkpoints)
    if _has_finished(config, checkpoints):
        console.print(f"this run is finished: {config.total_steps} steps; its tokenizer is {folder / 'model'}")
        return folder / "model"
    if (folder / "config.json").exists() and any((folder / name).exists() for name in TRACES):
        check_same_run(config, folder / "config.json", free=FREE)
    check_replaceable(folder / "model")
    device = use_device(config)
    tokenizer = _initial_tokenizer(config, device)
    clips, held_out = (
        open_clips(config.corpus, split, tokenizer.config.sample_rate) for split in ("train", "heldout")
    )  # fmt: skip
    with held_run(config, checkpoints, free=FREE, growing=(), traces=TRACES, console=console) as newest:
        trainer = Trainer(config, tokenizer, clips, held_out, checkpoint=newest, console=console)
        trainer.run()
        save_audio_tokenizer(tokenizer.eval(), folder / "model")
        report = write_report(folder, tokenizer, held_out)
        console.print(f"tokenizer  {folder / 'model'}\nreport     {report}", soft_wrap=True)
    return folder / "model"


def _has_finished(config: AudioTokenizerTrainConfig, checkpoints: Checkpoints) -> bool:
    """Return whether the run of this config is finished and complete. Raises ConfigError for another config's run."""
    folder, newest = Path(config.run_folder), checkpoints.newest()
    files = (folder / "config.json", folder / "model" / "config.json", folder / "report.html")
    if newest is None or checkpoints.newest_step() != config.total_steps or not all(path.exists() for path in files):
        return False
    check_same_run(config, folder / "config.json", free=FREE)
    return any((folder / "model").glob("*.safetensors")) and find_damage(newest) is None


def _initial_tokenizer(config: AudioTokenizerTrainConfig, device: torch.device) -> AudioTokenizer:
    if config.init_from is not None:
        return load_audio_tokenizer(config.init_from, device=str(device))
    assert config.tokenizer is not None, "checked by the config"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return AudioTokenizer(preset(config.tokenizer)).to(device)
