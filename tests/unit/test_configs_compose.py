"""Every field of every config is read by the package and has a command-line option; engine settings are nested."""

import ast
import dataclasses
import importlib
import pkgutil
import re
import typing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import save_tiny_checkpoint

import openmimo
from openmimo.arguments import parse
from openmimo.cli import ExpertsOptions, GenerateOptions, ServeOptions, SpeakOptions, load_recipe
from openmimo.core.errors import ConfigError
from openmimo.core.fields import field_types
from openmimo.core.records import SamplingParams
from openmimo.data.audio.config import CorpusConfig
from openmimo.data.config import TaskConfig
from openmimo.demo.audio.config import AudioDemoConfig
from openmimo.demo.config import ChainConfig, DemoConfig
from openmimo.engine.config import EngineConfig
from openmimo.engine.llm import LLM
from openmimo.evals.config import EvalConfig
from openmimo.parallel.config import PlanConfig
from openmimo.rl.config import BatchConfig, CompareConfig, MopdConfig, RlConfig, SchedulerConfig
from openmimo.train.audio.config import AudioTrainConfig
from openmimo.train.audio.tokenizer.config import AudioTokenizerTrainConfig, LossWeights
from openmimo.train.config import ExtendConfig, PhaseSettings, PretrainConfig, RunConfig, SftConfig, TrainConfig

PACKAGE = Path(openmimo.__file__).parent
COMMANDS = (
    PretrainConfig, ExtendConfig, SftConfig, RlConfig, MopdConfig, CompareConfig, DemoConfig, ChainConfig, EvalConfig,
    SpeakOptions, GenerateOptions, ServeOptions, PlanConfig, ExpertsOptions, AudioDemoConfig, AudioTrainConfig,
    AudioTokenizerTrainConfig, CorpusConfig,
)  # fmt: skip


def config_modules():
    """Every `config.py` of the package but those of models, whose fields come from a checkpoint."""
    names = [module.name for module in pkgutil.walk_packages([str(PACKAGE)], "openmimo.")]
    return [
        name
        for name in names
        if name.endswith(".config") and not name.startswith("openmimo.model.") and name != "openmimo.core.config"
    ]


def config_classes():
    for name in config_modules():
        for value in vars(importlib.import_module(name)).values():
            if dataclasses.is_dataclass(value) and value.__module__ == name:
                yield value


def attributes_read():
    """Names of the attributes that the package reads, without the checks of the configs themselves."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


def reachable(config_type, found):
    """Adds the dataclasses in an annotation, with their bases, to `found`."""
    for argument in typing.get_args(config_type):
        reachable(argument, found)
    if isinstance(config_type, type) and dataclasses.is_dataclass(config_type) and config_type not in found:
        found.update(base for base in config_type.__mro__ if dataclasses.is_dataclass(base))
        for annotation in field_types(config_type).values():
            reachable(annotation, found)
    return found


def test_every_field_is_read():
    read = attributes_read()
    unread = [
        f"{config.__name__}.{field.name}"
        for config in config_classes()
        for field in dataclasses.fields(config)
        if field.name not in read and config is not LossWeights  # read by the names of losses
    ]
    assert unread == []


def test_every_config_is_reachable_from_a_command():
    found = set()
    for command in COMMANDS:
        reachable(command, found)
    names = {field.name for config in found for field in dataclasses.fields(config)}
    assert {field.name for field in dataclasses.fields(SchedulerConfig)} <= names
    indirect = {SchedulerConfig, TaskConfig}  # built by RlConfig.scheduler, and from the options of a source
    assert set(config_classes()) - found - indirect == set()


def leaves(value, name=""):
    """Returns the dotted names of the options of a config; a dict's options have its keys as names."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}.{index}")
    elif not isinstance(value, dict):
        yield name


@pytest.mark.parametrize("verb", ["pretrain", "extend", "sft", "rl", "mopd", "compare"])
def test_every_option_of_a_recipe_is_parsed(verb, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")
    config = load_recipe("tiny_cpu", verb)
    with pytest.raises(SystemExit):
        parse(type(config), ["--help"], f"openmimo {verb}", config)
    shown = set(re.findall(r"--[a-z0-9][a-z0-9.-]*", capsys.readouterr().out))
    options = {"--" + name.replace("_", "-") for name in leaves(config)}
    assert options - shown == set()


def test_shared_settings_are_declared_once():
    for config in (PretrainConfig, ExtendConfig, SftConfig, RlConfig, MopdConfig):
        assert issubclass(config, RunConfig)
        assert "run_folder" not in vars(config).get("__annotations__", {})
    assert issubclass(SftConfig, PhaseSettings) and issubclass(ExtendConfig, TrainConfig)
    assert issubclass(RlConfig, BatchConfig) and issubclass(SchedulerConfig, BatchConfig)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"))


def test_an_llm_takes_an_engine_config(folder):
    prompt = np.random.default_rng(0).integers(0, 200, 40).tolist()
    params = SamplingParams(max_tokens=8, temperature=0.0)
    plain = LLM(folder, device="cpu").generate([prompt], params)[0].token_ids
    engine = EngineConfig(max_sequences=2, cache_dtype="float32", page_positions=16, prefill_tokens=7)
    llm = LLM(folder, device="cpu", engine=engine)
    assert llm.engine.config == engine
    assert llm.generate([prompt], params)[0].token_ids == plain
    assert LLM(folder, device="cpu", engine=engine, speculative=False).engine.config == replace(
        engine, speculative=False
    )
    assert LLM(folder, device="cpu", cache_dtype="bfloat16", max_sequences=3).engine.config.cache_dtype == "bfloat16"


def test_an_llm_names_a_wrong_engine_setting(folder):
    with pytest.raises(ConfigError, match=r"no field 'max_sequence'; did you mean 'max_sequences'"):
        LLM(folder, max_sequence=3)
    with pytest.raises(ConfigError, match="engine is a dict"):
        LLM(folder, engine={"max_sequences": 3})
