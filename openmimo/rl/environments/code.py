"""A code agent with three tools, `bash`, `str_replace` and `finish`, on small repositories with one bug.

The agent works in a jailed folder, with a minimal system turn and no workflow (paper section 4.3.2). Hidden tests go in
only after `finish`, and of them only the arguments: what comes out is compared outside the jail. There is no history
that could leak the mend (appendix B). Without a jail that holds on this machine the environment refuses to open.
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
    """Settings.

    Attributes:
        min_difficulty: Functions in the smallest repositories (1 to 8).
        max_difficulty: Functions in the largest ones.
        rewarded: "all" pays only if all hidden tests pass; "strict" and "soft" pay by groups of tests of unequal
            difficulty, as `data.tasks._graded_tests` says (partial work may earn a little).
        max_calls: After so many calls the episode ends.
        quota: Calls of each tool at one time, of all episodes.
        wall_seconds: For one command; the model is told if it is cut off.
        output_characters: Of a command's output that the model sees.
        warm: Working folders that are made in advance.
        tier: The kind of jail; "" takes the best that holds here.
        allow_unsafe: Work even where no jail holds, with resource limits only.
        distinct: So many different problems, round and round (0: endlessly new ones).
        system: The system turn, before the functions.
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
        """See Worker."""
        if not arguments["command"].strip() or "\0" in arguments["command"]:
            raise ToolMistakeError("there is no command")
        workspace: Workspace = arguments["environment"]
        try:
            return self._told(workspace.run(["bash", "-c", arguments["command"]]))
        except WorkspaceError as error:
            raise ToolMistakeError(str(error)) from error

    def close(self) -> None:
        """See Worker."""

    def _told(self, ended: SandboxResult) -> str:
        """What the model sees: both outputs, the middle left out if they are long, and how the command ended."""
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
        """See Worker."""
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
        """See Worker."""


class TestWorker:
    """Runs hidden tests in the working folder of an episode: a bool for each."""

    __test__ = False  # for pytest: not a class of tests

    def __init__(self, limits: SandboxLimits):
        self._limits = limits

    def call(self, arguments: Mapping[str, Any]) -> list[bool]:
        """See Worker."""
        repository: Repository = arguments["repository"]
        tests = [CallTest(test.arguments, test.expected) for test in repository.tests]
        source = f"from {repository.module} import {repository.function}"
        runner = _FolderRunner(arguments["environment"], self._limits)
        try:
            found = outcomes(runner, source, tests, function=repository.function)
        except WorkspaceError:  # what the agent left cannot be tested
            return [False] * len(tests)
        return [outcome.passed for outcome in found]

    def close(self) -> None:
        """See Worker."""


class _FolderRunner:
    """A working folder as the runner that grading asks for."""

    def __init__(self, workspace: Workspace, limits: SandboxLimits):
        self._workspace, self.limits = workspace, limits

    def run(self, program: str, files: None = None, stdin: bytes = b"") -> SandboxResult:
        return self._workspace.run(program, stdin)


class CodeEpisode(ChatToolEpisode):
    """One bug."""

    def __init__(self, content: Repository, options: Options, sessions: ToolSessions):
        turns = (Message("system", options.system), Message("user", content.issue))
        super().__init__(turns, TOOLS, options.max_calls)
        self._repository, self._rewarded = content, options.rewarded
        self._session: ToolSession = sessions.open(lambda workspace: lay_out(workspace, content))

    def run(self, name: str, arguments: Mapping[str, Any]) -> str:
        """See ChatToolEpisode."""
        if name == "finish":
            self.is_over = True
            self._session.start_reward("tests", {"repository": self._repository})
            return ""
        return self._session.call(name, arguments).text

    def reward(self) -> float:
        """See Episode. Nothing without `finish`."""
        if not self.is_over:
            return 0.0
        passed = self._session.reward()
        if self._rewarded == "all":
            return float(all(passed))
        graded = strict_reward if self._rewarded == "strict" else soft_reward
        return graded(passed, self._repository.groups)

    def close(self) -> None:
        """See Episode."""
        self._session.close()


def lay_out(workspace: Workspace, repository: Repository) -> None:
    """Writes a repository into an empty working folder. All files get one time, which tells nothing."""
    workspace.write_all(repository.files)
    for folder, _, names in os.walk(workspace.paths.work, topdown=False):
        for path in (*(os.path.join(folder, name) for name in names), folder):
            os.utime(path, (FIXED_TIME, FIXED_TIME))


def make(rng: random.Random, difficulty: int) -> Question:
    """A repository of `difficulty` functions, one of them with a bug."""
    repository = make_repository(rng, difficulty)
    return Question(repository.issue, repository, str(repository.files))


def problems(options: Options, split: Split, seed: int) -> Callable[[int], Problem]:
    """See Environment."""
    return problem_stream(
        "code",
        make,
        difficulties=(options.min_difficulty, options.max_difficulty),
        distinct=options.distinct,
        split=split,
        seed=seed,
    )


def open_episode(problem: Problem, options: Options) -> CodeEpisode:
    """See Environment. Raises SandboxUnavailableError if no jail holds on this machine."""
    key = (options.quota, options.wall_seconds, options.output_characters, options.warm, options.tier,
           options.allow_unsafe)  # fmt: skip
    return CodeEpisode(problem.content, options, shared("code", key, lambda: start_sessions(options)))


def start_sessions(options: Options) -> ToolSessions:
    """The tools and working folders of all episodes with the same limits."""
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
