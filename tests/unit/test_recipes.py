"""Every shipped recipe builds, survives saving and loading, and has consistent stages."""

import importlib
import inspect
import json

import numpy as np
import pytest

from openmimo.cli import load_recipe, recipe_names
from openmimo.core import config as config_io
from openmimo.core.errors import ConfigError
from openmimo.data.source import open_source
from openmimo.model.presets import model_config
from openmimo.rl.agents.environment import open_environment
from openmimo.train.config import ExtendConfig, PretrainConfig, SftConfig
from openmimo.train.optim import learning_rate, rows_of_step, total_steps


def all_recipes():
    for name in recipe_names():
        module = importlib.import_module(f"recipes.{name}")
        for function in vars(module).values():
            if callable(function) and getattr(function, "__module__", "") == module.__name__:
                annotation = function.__annotations__.get("return")
                if annotation in (PretrainConfig, ExtendConfig) and not function.__name__.startswith("_"):
                    yield f"{name}:{function.__name__}"


@pytest.mark.parametrize("name", list(all_recipes()))
def test_recipe(name):
    config = load_recipe(name, "pretrain")
    assert config_io.from_dict(type(config), json.loads(json.dumps(config_io.to_dict(config)))) == config
    run = config.as_pretraining() if isinstance(config, ExtendConfig) else config
    model_config(run.model or "tiny")
    for stage in run.stages:
        rates = [learning_rate(stage, step) for step in range(0, stage.steps, max(1, stage.steps // 100))]
        assert 0 < min(rates) <= max(rates) <= stage.learning_rate


def all_functions():
    for name in recipe_names():
        module = importlib.import_module(f"recipes.{name}")
        for function in vars(module).values():
            takes_nothing = callable(function) and not inspect.signature(function).parameters
            if takes_nothing and getattr(function, "__module__", "") == module.__name__:
                yield f"{name}:{function.__name__}"


@pytest.mark.parametrize("name", list(all_functions()))
def test_every_recipe_is_saved_and_read_back(name):
    config = load_recipe(name, "")
    assert config_io.from_dict(type(config), json.loads(json.dumps(config_io.to_dict(config)))) == config
    for source in getattr(config, "sources", ()):
        environment, options = open_environment(source.environment, source.options)
        environment.problems(options, "train", 0)(0)
    if isinstance(config, SftConfig):
        for source in config.mixture.sources:
            open_source(source)


def test_the_report_in_numbers():
    """27T tokens; the learning rate at the phase boundaries of the report's schedule."""
    stages = load_recipe("flash_309b", "pretrain").stages
    first = stages[0]
    read = np.cumsum([rows_of_step(first, step) for step in range(first.steps)]) * first.sequence_length / 1e12
    assert read[-1] == pytest.approx(22, rel=1e-3)
    assert read[first.batch_warmup_steps - 1] == pytest.approx(0.5, rel=1e-3)
    assert read[first.warmup_steps - 1] == pytest.approx(0.05, rel=1e-2)
    assert read[first.warmup_steps + first.constant_steps - 1] == pytest.approx(12.05, rel=1e-3)
    later = [stage.steps * stage.global_batch_size * stage.sequence_length for stage in stages[1:]]
    assert [round(count / 1e12, 3) for count in later] == [4.0, 1.0]
    assert total_steps(stages) == sum(stage.steps for stage in stages)
    assert learning_rate(first, first.warmup_steps) == pytest.approx(3.2e-4)
    assert learning_rate(first, first.steps - 1) == pytest.approx(1e-4, rel=1e-3)


def test_unknown_recipes_are_refused_by_name():
    with pytest.raises(ConfigError, match="tiny_cpu"):
        load_recipe("tiny_gpu", "pretrain")
    with pytest.raises(ConfigError, match="all_global"):
        load_recipe("ablation", "pretrain")
