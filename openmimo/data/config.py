"""Configuration of data: sources, mixtures and tasks. Imports no torch."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from openmimo.core.config import to_dict
from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, NonNegativeFloat, PositiveFloat, check_fields

PATH_OPTIONS = ("path", "test_path")


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture.

    Attributes:
        name: A file in `openmimo/data/sources`, or `package.module:Object`.
        weight: Share of the rows, relative to the other weights.
        options: Settings of the source (its `options` dataclass lists them).
        max_megabytes: Maximum text to read, in 10^6 bytes of UTF-8 (0: all). Only for text sources.
    """

    name: str
    weight: PositiveFloat = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    max_megabytes: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        check_fields(self, f"source {self.name!r}")


@dataclass(frozen=True)
class MixtureConfig:
    """The sources of one training stage.

    Attributes:
        sources: The mixed sources.
        validation_fraction: Share of documents, conversations, problems and generated examples that is held out. The
            hash of the content decides, so that all copies of an example are in the same split in every stage and run.
            0 holds out nothing and permits no evaluation.
    """

    sources: tuple[SourceConfig, ...]
    validation_fraction: Annotated[float, Bounds(least=0, below=1)] = 0.01

    def __post_init__(self) -> None:
        check_fields(self, "mixture")
        if not self.sources:
            raise ConfigError("A mixture needs at least one source.")


@dataclass(frozen=True)
class TaskConfig:
    """Problems of one family of verifiable tasks.

    Attributes:
        name: A file in `openmimo/data/tasks`, or `package.module:Object`.
        min_difficulty: Lowest difficulty. The family defines the meaning of a level.
        max_difficulty: Highest difficulty. Levels are drawn uniformly.
        weight: Share of the problems in a mixture of tasks, relative to the other weights.
        options: Settings of the family (its `options` dataclass lists them).
    """

    name: str
    min_difficulty: int = 2
    max_difficulty: int = 2
    weight: PositiveFloat = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, f"task {self.name!r}")
        if self.min_difficulty > self.max_difficulty:
            raise ConfigError(
                f"Task {self.name!r} has min_difficulty {self.min_difficulty} above max_difficulty "
                f"{self.max_difficulty}."
            )


def demonstrations(*tasks: TaskConfig, weight: float = 1.0, noise: float = 0.0, system: str = "") -> SourceConfig:
    """Return a source of demonstrations of `tasks`; `openmimo/data/sources/tasks.py` documents its options."""
    return SourceConfig("tasks", weight, {"tasks": [to_dict(task) for task in tasks], "noise": noise, "system": system})


def without_paths(tree: Any) -> Any:
    """Return a result of `to_dict` without data paths, since the location of data does not change a run."""
    if isinstance(tree, dict):
        kept = {key: without_paths(value) for key, value in tree.items()}
        if isinstance(kept.get("options"), dict):
            kept["options"] = {key: value for key, value in kept["options"].items() if key not in PATH_OPTIONS}
        return kept
    return [without_paths(item) for item in tree] if isinstance(tree, list) else tree
