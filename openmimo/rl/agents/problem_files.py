"""The problem files of a run, so that a resumed run detects changed problems."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from openmimo.core.config import from_dict, to_dict
from openmimo.core.errors import CheckpointError
from openmimo.core.files import write_text_atomic
from openmimo.core.reading import read_json
from openmimo.data.source import FileContent
from openmimo.rl.agents.environment import open_environment
from openmimo.rl.config import RlSource

PROBLEMS_FILE = "problems.json"
Files = Mapping[str, tuple[FileContent, ...]]


def problem_files(sources: Sequence[RlSource]) -> dict[str, tuple[FileContent, ...]]:
    """The files of each source's problems with the hash of their content. Raises ConfigError or DataError."""
    found = {}
    for source in sources:
        environment, options = open_environment(source.environment, source.options)
        found[source.name] = environment.files(options)
    return found


def keep_problem_files(files: Files, run_folder: Path) -> None:
    """Saves the problem files of a new run."""
    write_text_atomic(run_folder / PROBLEMS_FILE, json.dumps(to_dict(files), indent=2) + "\n")


def check_same_problems(files: Files, run_folder: Path) -> None:
    """Raises CheckpointError if the run in `run_folder` was started on other problems. Files may have moved."""
    path = run_folder / PROBLEMS_FILE
    if not path.exists():
        return
    before = from_dict(dict[str, tuple[FileContent, ...]], read_json(path), where=str(path))
    for name, now in files.items():
        for old, new in zip(before.get(name, ()), now, strict=False):
            if old.sha256 != new.sha256:
                raise CheckpointError(
                    f"The problems of source {name!r} in {new.path} have changed: the run in {run_folder} was started "
                    f"on content {old.sha256[:12]}, read from {old.path}; now it is {new.sha256[:12]}. Restore "
                    "the file, or set another run_folder for a new run."
                )
        if len(before.get(name, ())) != len(now):
            raise CheckpointError(
                f"The problems of source {name!r} now come from {len(now)} files, but the run in {run_folder} was "
                f"started on {len(before.get(name, ()))}. Use the same files, or set another run_folder for a new run."
            )
