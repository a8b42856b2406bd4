"""Config keys, options and names of the previous version still work, with one warning that names the new ones."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint

import openmimo.train.config
from openmimo.arguments import with_new_options
from openmimo.cli import load_recipe
from openmimo.core import config as config_io
from openmimo.core.errors import ConfigError
from openmimo.data.config import MixtureConfig, SourceConfig
from openmimo.rl.config import MopdConfig
from openmimo.train.config import CheckpointConfig, EvaluationConfig, Phase, PretrainConfig, SftConfig
from openmimo.train.pretrain import sft

OLD = {
    "global_batch_size": "rows", "learning_rate": "peak_lr", "end_learning_rate": "end_lr",
    "initial_batch_size": "rows_at_start", "batch_warmup_steps": "rows_warmup_steps",
    "micro_batch_size": "rows_per_microbatch", "optimizer": "optimiser",
}  # fmt: skip


def with_old_keys(values):
    """Returns the values of a saved config with the keys of the previous version."""
    if isinstance(values, dict):
        return {OLD.get(key, key): with_old_keys(value) for key, value in values.items()}
    return [with_old_keys(value) for value in values] if isinstance(values, list) else values


@pytest.mark.parametrize(("recipe", "verb"), [("small_1gpu", "pretrain"), ("tiny_cpu", "extend"), ("tiny_cpu", "sft")])
def test_a_saved_config_with_old_keys_is_the_same_config(recipe, verb, tmp_path, capsys):
    config = load_recipe(recipe, verb)
    old = tmp_path / "config.json"
    old.write_text(json.dumps(with_old_keys(config_io.to_dict(config))))
    assert config_io.load(type(config), old) == config
    assert "rows (now global_batch_size)" in capsys.readouterr().err


def test_a_saved_post_training_config_with_the_old_spelling_is_read():
    config = load_recipe("tiny_cpu", "mopd")
    values = config_io.to_dict(config)
    values["optimiser"] = values.pop("optimizer")
    assert config_io.from_dict(MopdConfig, values) == config


def test_python_recipes_with_old_names_are_read(capsys):
    stage = openmimo.train.config.Stage
    assert stage is Phase
    mixture = load_recipe("tiny_cpu", "sft").mixture
    old = stage("a", steps=3, sequence_length=8, rows=4, peak_lr=1e-3, end_lr=1e-4, mixture=mixture)
    new = Phase(
        "a", steps=3, sequence_length=8, global_batch_size=4, learning_rate=1e-3, end_learning_rate=1e-4,
        mixture=mixture,
    )  # fmt: skip
    assert old == new
    run = PretrainConfig("run", (old,), rows_per_microbatch=2)
    assert run == PretrainConfig("run", (new,), micro_batch_size=2)
    assert isinstance(replace(load_recipe("tiny_cpu", "sft"), warmup_steps=5), SftConfig)
    with pytest.raises(ConfigError, match=r"'rows' and also 'global_batch_size'"):
        replace(new, rows=3)


def test_old_options_are_read(capsys):
    words = ["--stages.0.rows", "8", "--stages.1.peak-lr=1e-3", "--rows-per-microbatch", "4", "--stages.0.steps", "2"]
    assert with_new_options(PretrainConfig, words, "openmimo pretrain") == [
        "--stages.0.global-batch-size", "8", "--stages.1.learning-rate=1e-3", "--micro-batch-size", "4",
        "--stages.0.steps", "2",
    ]  # fmt: skip
    assert "--stages.1.peak-lr (now --stages.1.learning-rate)" in capsys.readouterr().err


def test_an_old_option_reaches_the_run(tmp_path):
    command = [sys.executable, "-m", "openmimo", "sft", "tiny_cpu", "--rows", "0", "--run-folder", str(tmp_path / "r")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "global_batch_size is 0" in ended.stderr


def test_a_run_folder_of_the_version_before_is_resumed(tmp_path, without_figures):
    start = save_tiny_checkpoint(tmp_path / "start")
    source = SourceConfig("repeats", options={"alphabet": "characters", "min_length": 64})
    config = SftConfig(
        str(start), str(tmp_path / "run"), mixture=MixtureConfig((source,), validation_fraction=0.05), steps=2,
        sequence_length=64, global_batch_size=2, micro_batch_size=2, device="cpu", dtype="float32",
        checkpoints=CheckpointConfig(every_steps=1), evaluation=EvaluationConfig(every_steps=5, batches=1),
    )  # fmt: skip
    model = sft(config, console=Console(file=io.StringIO()))
    expected = load_file(model / "model.safetensors")
    shutil.rmtree(model)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    saved = tmp_path / "run" / "config.json"
    saved.write_text(json.dumps(with_old_keys(json.loads(saved.read_text()))))
    trainer = tmp_path / "run" / "checkpoints" / "step-00000001" / "trainer"
    (trainer / "optimizer.safetensors").rename(trainer / "optimiser.safetensors")
    manifest = (trainer / "manifest.json").read_text()
    (trainer / "manifest.json").write_text(manifest.replace("optimizer.safetensors", "optimiser.safetensors"))
    output = io.StringIO()
    resumed = load_file(sft(config, console=Console(file=output)) / "model.safetensors")
    assert "step-00000001" in output.getvalue().replace("\n", "")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
