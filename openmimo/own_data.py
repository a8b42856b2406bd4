"""Options that put the user's own data in the place of a recipe's: --data, --problems, --reward, --environment.

Each class is a group of options with a method that returns a recipe's config with the user's data. Options of single
settings (`--stages.1.steps 100`) apply to the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from openmimo.core.config import to_dict
from openmimo.core.errors import ConfigError, DataError
from openmimo.data.config import MixtureConfig, SourceConfig, TaskConfig
from openmimo.data.source import TextSource, open_source
from openmimo.data.text_files import text_source
from openmimo.rl.config import RlConfig
from openmimo.train.config import ExtendConfig, PretrainConfig, SftConfig


@dataclass(frozen=True)
class OwnTexts:
    """Your own texts.

    Attributes:
        data: Train on these texts in place of the recipe's: a text file, a .jsonl or .parquet file, or a folder of one
            of these kinds; .gz and .zst also. The examples that the recipe generates stay.
        data_field: Key (.jsonl) or column (.parquet) of the text (None: text).
    """

    data: str | None = None
    data_field: str | None = None

    def put_into(self, config: PretrainConfig | ExtendConfig) -> PretrainConfig | ExtendConfig:
        """The config with these texts. Raises ConfigError or DataError."""
        _refuse_alone(self, "data_field", "data")
        if self.data is None:
            return config
        source = text_source(self.data, self.data_field)
        if isinstance(config, ExtendConfig):
            return replace(config, mixture=_with_texts(config.mixture, source))
        stages = tuple(replace(stage, mixture=_with_texts(stage.mixture, source)) for stage in config.stages)
        if stages == config.stages:
            raise ConfigError("--data: no stage of this recipe reads text, so there is nothing to replace.")
        return replace(config, stages=stages)


@dataclass(frozen=True)
class OwnChats:
    """Your own conversations.

    Attributes:
        data: Fine-tune on these conversations in place of the recipe's data: a .jsonl (.gz, .zst) or .parquet file, or
            a folder of them, with `messages` in each line or row.
    """

    data: str | None = None

    def put_into(self, config: SftConfig) -> SftConfig:
        """The config with these conversations. Raises DataError."""
        if self.data is None:
            return config
        check_object_files(self.data, "--data")
        chats = SourceConfig("chat", options={"path": self.data, "thinking": "auto"})
        return replace(config, mixture=replace(config.mixture, sources=(chats,)))


@dataclass(frozen=True)
class OwnProblems:
    """Your own problems, reward or environment.

    Attributes:
        problems: Learn from these problems in place of the recipe's: a .jsonl (.gz, .zst) or .parquet file with
            `prompt` and `answer` in each line or row. A tenth is held out.
        test_problems: Held-out problems, in place of that tenth.
        scoring: How answers are compared with the key: exact, contains, numeric or math (None: exact).
        reward: Your function, FILE.py:FUNCTION, that scores answers in place of a comparison: score(problem, text).
        environment: Your environment, FILE.py:OBJECT, in place of the recipe's problems.
        environment_options: Settings of that environment: --environment-options.NAME VALUE.
    """

    problems: str | None = None
    test_problems: str | None = None
    scoring: Literal["exact", "contains", "numeric", "math"] | None = None
    reward: str | None = None
    environment: str | None = None
    environment_options: Mapping[str, Any] = field(default_factory=dict)

    def put_into(self, config: RlConfig) -> RlConfig:
        """The config with one source of problems, whose batch settings are those of the recipe's first source.

        Raises:
            ConfigError: Options exclude each other, or have no effect.
            DataError: A file is not there, or of another kind.
        """
        needed = dict.fromkeys(("test_problems", "scoring", "reward"), "problems") | {
            "environment_options": "environment"
        }
        for name, other in needed.items():
            _refuse_alone(self, name, other)
        if self.problems and self.environment:
            raise ConfigError("--problems and --environment exclude each other: an environment has its own problems.")
        if self.reward and self.scoring:
            raise ConfigError("--reward and --scoring exclude each other: the function scores the answers.")
        if not self.problems and not self.environment:
            return config
        source = self._environment() if self.environment else self._problems()
        return replace(config, sources=(replace(config.sources[0], **source),))

    def _environment(self) -> dict[str, Any]:
        assert self.environment is not None
        name = Path(self.environment.rpartition(":")[0] or self.environment).stem
        return {"name": name, "environment": self.environment, "options": dict(self.environment_options)}

    def _problems(self) -> dict[str, Any]:
        assert self.problems is not None
        check_object_files(self.problems, "--problems")
        if self.test_problems is not None:
            check_object_files(self.test_problems, "--test-problems")
        given = {"test_path": self.test_problems, "scoring": self.scoring, "reward": self.reward}
        options = {"path": self.problems} | {key: value for key, value in given.items() if value is not None}
        task = to_dict(TaskConfig("jsonl", min_difficulty=0, max_difficulty=1000, options=options))
        return {"name": Path(self.problems).stem, "environment": "task", "options": {"task": task}}


def _refuse_alone(own: Any, name: str, other: str) -> None:
    """Raises ConfigError if the option `name` is given without `other`."""
    if getattr(own, name) and not getattr(own, other):
        option = f"--{name.replace('_', '-')}"
        raise ConfigError(f"{option} has no effect without --{other}; give both, or omit {option}.")


def _with_texts(mixture: MixtureConfig, source: SourceConfig) -> MixtureConfig:
    """The mixture with one source of texts, which has the weight of all its text sources together."""
    texts = [config for config in mixture.sources if isinstance(open_source(config)[0], TextSource)]
    if not texts:
        return mixture
    generated = tuple(config for config in mixture.sources if config not in texts)
    weight = sum(config.weight for config in texts)
    return replace(mixture, sources=(replace(source, weight=weight), *generated))


def check_object_files(path: str, option: str) -> None:
    """Raises DataError for a path that is not there, or a file of another kind."""
    place = Path(path)
    if not path.strip() or "\0" in path or not place.expanduser().exists():
        raise DataError(f"{option} {path}: there is no such file. Give a .jsonl or .parquet file.")
    if place.suffix.lower() in (".csv", ".tsv", ".arrow", ".xlsx"):
        raise DataError(
            f"{option} {path}: {place.suffix} files are not read here. Write one JSON object per line as .jsonl, or a "
            "Parquet file."
        )


Own = OwnTexts | OwnChats | OwnProblems


def own_data_of(config_type: type) -> type[Own] | None:
    """The options for the user's own data of a verb with this config; None if it has none."""
    own: dict[type, type[Own]] = {
        PretrainConfig: OwnTexts, ExtendConfig: OwnTexts, SftConfig: OwnChats, RlConfig: OwnProblems,
    }  # fmt: skip
    return own.get(config_type)


def with_own_data(config: Any, own: Own) -> Any:
    """The config of a recipe with the user's own data. Raises ConfigError or DataError."""
    return own.put_into(config)
