"""A code agent with three tools, `bash`, `str_replace` and `finish`, on small repositories with one bug.

The agent works in a jailed folder, with a minimal system message and no workflow (paper section 4.3.2). The arguments
of hidden tests enter the jail only after `finish`; results are compared outside of it. No history leaks the fix
(appendix B). The environment refuses to open if no jail works on this machine.
"""

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from openmimo.core.errors import ConfigError
from openmimo.core.records import Message
from openmimo.data.source import Split
from openmimo.data.tasks._graded_tests import soft_reward, strict_reward
from openmimo.rl.agents.chat_tools import ChatToolEpisode, function_tool
from openmimo.rl.agents.environment import Environment
from openmimo.rl.agents.problem_stream import Question, check_difficulties, problem_stream
from openmimo.rl.scheduling.problems import Problem
from openmimo.rl.toolbox import (
    Tool,
    Toolbox,
    ToolLimits,
    ToolMistakeError,
    ToolSession,
    ToolSessions,
    WarmEnvironments,
    shared,
)
from openmimo.rl.worlds.repositories import FIXED_TIME, Repository, make_repository
from openmimo.runtime.sandbox import (
    CallTest,
    Sandbox,
    SandboxLimits,
    SandboxResult,
    Workspace,
    WorkspaceError,
    outcomes,
)

TOOLS = (
    function_tool(
        "bash",
        "Runs a command in the repository; nothing goes on in the background.",
        {"command": ("string", "the command")},
    ),
    function_tool(
        "str_replace",
        "Replaces a text that a file has exactly once.",
        {
            "path": ("string", "the file, from the repository's root"),
            "old_str": ("string", "the text"),
            "new_str": ("string", "what replaces it"),
        },
    ),
    function_tool("finish", "Says that the work is done. The tests run then.", {}),
)
DIFFICULTIES = range(1, 9)
JAIL_START_SECONDS = 30.0


@dataclass(frozen=True)
class Options:
    """Options of environment `code`.

    Attributes:
        min_difficulty: Functions in the smallest repositories (1 to 8).
        max_difficulty: Functions in the largest ones.
        rewarded: "all" rewards only if all hidden tests pass; "strict" and "soft" reward by groups of tests of unequal
            difficulty (`data.tasks._graded_tests`), so partial work may earn a small reward.
        max_calls: Number of calls after which the episode ends.
        quota: Simultaneous calls of each tool, over all episodes.
        wall_seconds: Time limit of a command. The model sees a note if the command is stopped.
        output_characters: Characters of a command's output that the model sees.
        warm: Number of working folders created in advance.
        tier: The tier of the jail; "" selects the best one that works here.
        allow_unsafe: Run with resource limits only if no jail works.
        distinct: Number of distinct problems, which repeat in order (0: unlimited new ones).
        system: The system message, before the functions.
    """

    min_difficulty: int = 2
    max_difficulty: int = 4
    rewarded: Literal["all", "strict", "soft"] = "all"
    max_calls: int = 30
    quota: int = 4
    wall_seconds: float = 10.0
    output_characters: int = 4000
    warm: int = 0
    tier: str = ""
    allow_unsafe: bool = False
    distinct: int = 0
    system: str = "You are in the root folder of a repository."

    def __post_init__(self) -> None:
        check_difficulties("code", self.min_difficulty, self.max_difficulty, DIFFICULTIES)
        if min(self.max_calls, self.quota, self.output_characters) < 1 or self.warm < 0:
            raise ConfigError("max_calls, quota and output_characters must be at least 1, and warm at least 0.")


class BashWorker:
    """Runs commands in the working folder of an episode."""

    def __init__(self, output_characters: int):
        self._longest = output_characters

    def call(self, arguments: Mapping[str, Any]) -> str:
        if not arguments["command"].strip() or "\0" in arguments["command"]:
            raise ToolMistakeError("there is no command")
        workspace: Workspace = arguments["environment"]
        try:
            return self._shown(workspace.run(["bash", "-c", arguments["command"]]))
        except WorkspaceError as error:
            raise ToolMistakeError(str(error)) from error

    def close(self) -> None:
        """Nothing to release."""

    def _shown(self, ended: SandboxResult) -> str:
        """The text for the model: both outputs, with the middle omitted if they are long, and the exit status."""
        text = ended.text + ended.error_text
        if len(text) > self._longest:
            half = self._longest // 2
            text = f"{text[:half]}\n... {len(text) - 2 * half} characters ...\n{text[-half:]}"
        if ended.killed_by:
            return f"{text}\n(stopped: {ended.killed_by} limit or signal)"
        return f"{text}\n(exit code {ended.exit_code})" if ended.exit_code else text or "(no output)"


class ReplaceWorker:
    """Edits files in the working folder of an episode."""

    def call(self, arguments: Mapping[str, Any]) -> str:
        workspace: Workspace = arguments["environment"]
        path, old = arguments["path"], arguments["old_str"]
        try:
            text = workspace.read(path).decode()
            times = text.count(old) if old else 0
            if times != 1:
                raise ToolMistakeError(f"{path} has the text {times} times; it must have it once")
            workspace.write(path, text.replace(old, arguments["new_str"]))
        except WorkspaceError as error:
            raise ToolMistakeError(str(error)) from error
        except IsADirectoryError as error:
            raise ToolMistakeError(f"{path} is a folder") from error
        except UnicodeError as error:
            raise ToolMistakeError(f"{path} is not text") from error
        return f"{path} is changed"

    def close(self) -> None:
        """Nothing to release."""


class TestWorker:
    """Runs hidden tests in the working folder of an episode. The result is a bool per test."""

    __test__ = False  # for pytest: not a class of tests

    def __init__(self, limits: SandboxLimits):
        self._limits = limits

    def call(self, arguments: Mapping[str, Any]) -> list[bool]:
        repository: Repository = arguments["repository"]
        tests = [CallTest(test.arguments, test.expected) for test in repository.tests]
        source = f"from {repository.module} import {repository.function}"
        runner = _FolderRunner(arguments["environment"], self._limits)
        try:
            found = outcomes(runner, source, tests, function=repository.function)
        except WorkspaceError:  # the files of the agent cannot be tested
            return [False] * len(tests)
        return [outcome.passed for outcome in found]

    def close(self) -> None:
        """Nothing to release."""


class _FolderRunner:
    """Adapts a working folder to the runner interface of grading."""

    def __init__(self, workspace: Workspace, limits: SandboxLimits):
        self._workspace, self.limits = workspace, limits

    def run(self, program: str, files: None = None, stdin: bytes = b"") -> SandboxResult:
        return self._workspace.run(program, stdin)


class CodeEpisode(ChatToolEpisode):
    """An attempt to fix one bug."""

    def __init__(self, content: Repository, options: Options, sessions: ToolSessions):
        turns = (Message("system", options.system), Message("user", content.issue))
        super().__init__(turns, TOOLS, options.max_calls)
        self._repository, self._rewarded = content, options.rewarded
        self._session: ToolSession = sessions.open(lambda workspace: lay_out(workspace, content))

    def run(self, name: str, arguments: Mapping[str, Any]) -> str:
        if name == "finish":
            self.is_over = True
            self._session.start_reward("tests", {"repository": self._repository})
            return ""
        return self._session.call(name, arguments).text

    def reward(self) -> float:
        """The reward by the hidden tests; 0 without `finish`."""
        if not self.is_over:
            return 0.0
        passed = self._session.reward()
        if self._rewarded == "all":
            return float(all(passed))
        graded = strict_reward if self._rewarded == "strict" else soft_reward
        return graded(passed, self._repository.groups)

    def close(self) -> None:
        self._session.close()


def lay_out(workspace: Workspace, repository: Repository) -> None:
    """Writes a repository into an empty working folder. All files get the same time, so times reveal nothing."""
    workspace.write_all(repository.files)
    for folder, _, names in os.walk(workspace.paths.work, topdown=False):
        for path in (*(os.path.join(folder, name) for name in names), folder):
            os.utime(path, (FIXED_TIME, FIXED_TIME))


def make(rng: random.Random, difficulty: int) -> Question:
    """A repository of `difficulty` functions, one of them with a bug."""
    repository = make_repository(rng, difficulty)
    return Question(repository.issue, repository, str(repository.files))


def problems(options: Options, split: Split, seed: int) -> Callable[[int], Problem]:
    """The numbered problems of a split: generated repositories with failing tests."""
    return problem_stream(
        "code",
        make,
        difficulties=(options.min_difficulty, options.max_difficulty),
        distinct=options.distinct,
        split=split,
        seed=seed,
    )


def open_episode(problem: Problem, options: Options) -> CodeEpisode:
    """Opens an episode. Raises SandboxUnavailableError if no jail works on this machine."""
    key = (options.quota, options.wall_seconds, options.output_characters, options.warm, options.tier,
           options.allow_unsafe)  # fmt: skip
    return CodeEpisode(problem.content, options, shared("code", key, lambda: start_sessions(options)))


def start_sessions(options: Options) -> ToolSessions:
    """Starts the tools and working folders of all episodes with the same limits."""
    limits = SandboxLimits(wall_seconds=options.wall_seconds)
    sandbox = Sandbox(limits, options.tier or None, options.allow_unsafe)
    calls = ToolLimits(quota=options.quota, timeout_seconds=options.wall_seconds + JAIL_START_SECONDS)
    tools = {
        "bash": Tool(lambda: BashWorker(options.output_characters), calls),
        "str_replace": Tool(ReplaceWorker, calls),
        "tests": Tool(lambda: TestWorker(limits), calls),
    }
    return ToolSessions(Toolbox(tools), WarmEnvironments(sandbox.workspace, Workspace.close, warm=options.warm))


PLUGIN = Environment(
    describe="a code agent with bash, str_replace and finish on small repositories with one bug, in a jail",
    options=Options,
    problems=problems,
    open=open_episode,
    is_instant=lambda options: False,
)
