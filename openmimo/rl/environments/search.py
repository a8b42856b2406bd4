"""A search agent over a generated fact graph: tools `search`, `open` and `find`, and multi-hop questions.

The difficulty is the depth of the chain and the obfuscation of the first entity; answers are verifiable (paper section
4.3.2). Beyond a share of its context the agent may continue in a new one, with its history as a page (appendix C).
"""

import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from openmimo.core.errors import ConfigError
from openmimo.core.records import Message
from openmimo.data.source import Split
from openmimo.data.tasks._answers import score_answer
from openmimo.rl.agents.chat_tools import ChatToolEpisode, function_tool
from openmimo.rl.agents.context_management import ContextLimits, ManagedEpisode
from openmimo.rl.agents.environment import Environment, Episode
from openmimo.rl.agents.problem_stream import Question, check_difficulties, problem_stream
from openmimo.rl.scheduling.problems import Problem
from openmimo.rl.toolbox import Tool, Toolbox, ToolLimits, ToolMistakeError, ToolSession, ToolSessions, shared
from openmimo.rl.worlds.facts import MAX_DEPTH, MIN_ENTITIES, FactQuestion, FactWorld, fact_world

_PAGE = ("string", "the page's id")
TOOLS = (
    function_tool("search", "The pages that fit some words best.", {"query": ("string", "words to look for")}),
    function_tool("open", "The text of a page.", {"page": _PAGE}),
    function_tool(
        "find", "The lines of a page that hold a text.", {"page": _PAGE, "text": ("string", "what to look for")}
    ),
)
INSTRUCTION = "Look it up with the functions. In the end answer with the name alone."
MAX_LINES = 10


@dataclass(frozen=True)
class Options:
    """Options of environment `search`.

    Attributes:
        min_difficulty: Hops of the easiest questions (1 to 6).
        max_difficulty: Hops of the hardest ones.
        obfuscation: 0 names the first entity, 1 describes it, 2 describes it vaguely.
        entities: Number of entities of the world.
        world_seed: Seed of the world.
        results: Pages per search.
        max_calls: Number of calls after which the episode ends.
        quota: Simultaneous calls of each tool, over all episodes.
        calls_per_second: Rate of calls of each tool (0: no limit).
        timeout_seconds: Deadline of a call.
        backend: Where tools run: "threads" of this process, or "ray" actors on a cluster.
        context_characters: Maximum length of a conversation, for context management (0: none).
        context_share: The context is replaced beyond this share of it.
        distinct: Number of distinct problems, which repeat in order (0: unlimited new ones).
        system: The system message, before the functions.
    """

    min_difficulty: int = 1
    max_difficulty: int = 3
    obfuscation: int = 0
    entities: int = 120
    world_seed: int = 0
    results: int = 5
    max_calls: int = 30
    quota: int = 4
    calls_per_second: float = 0.0
    timeout_seconds: float = 30.0
    backend: Literal["threads", "ray"] = "threads"
    context_characters: int = 0
    context_share: float = 0.3
    distinct: int = 0
    system: str = ""

    def __post_init__(self) -> None:
        check_difficulties("search", self.min_difficulty, self.max_difficulty, range(1, MAX_DEPTH + 1))
        if self.obfuscation not in (0, 1, 2) or self.entities < MIN_ENTITIES or min(self.results, self.max_calls) < 1:
            raise ConfigError(
                f"obfuscation must be 0, 1 or 2, entities at least {MIN_ENTITIES}, results and max_calls at least 1."
            )


class SearchWorker:
    """Executes calls of one tool on one world."""

    def __init__(self, tool: str, num_entities: int, world_seed: int, num_results: int):
        self._tool, self._num_results = tool, num_results
        self._world: FactWorld = fact_world(num_entities, world_seed)

    def call(self, arguments: Mapping[str, Any]) -> str:
        if self._tool == "search":
            return self._search(arguments["query"])
        page = arguments["page"]
        if page not in self._world.pages:
            raise ToolMistakeError(f"there is no page {page!r}")
        text = self._world.pages[page]
        return text if self._tool == "open" else lines_with(text, arguments["text"])

    def close(self) -> None:
        """Nothing to release."""

    def _search(self, query: str) -> str:
        found = self._world.search(query, self._num_results)
        titles = (f"{page}: {self._world.pages[page].splitlines()[0]}" for page in found)
        return "\n".join(titles) or "no page has any of these words"


class SearchEpisode(ChatToolEpisode):
    """An attempt on one question."""

    def __init__(self, content: FactQuestion, options: Options, session: ToolSession):
        turns = (Message("system", options.system), Message("user", f"{content.prompt}\n{INSTRUCTION}"))
        super().__init__(turns, TOOLS, options.max_calls)
        self._answer, self._session = content.answer, session
        self._archived: dict[str, str] = {}

    def run(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Runs a tool. Pages of the archived history are served by the episode itself."""
        page = self._archived.get(arguments.get("page", ""))
        if page is not None:
            return page if name == "open" else lines_with(page, arguments["text"])
        return self._session.call(name, arguments).text

    def archive(self, name: str, text: str) -> str:
        self._archived[name] = text
        return f"Its history is the page {name!r}, for `open` and `find`."

    def reward(self) -> float:
        """1 if the content is the name (case-insensitive), else 0."""
        return score_answer("exact", self._answer, self.content)

    def close(self) -> None:
        self._session.close()


def lines_with(text: str, query: str) -> str:
    """The lines of a text that contain `query` (case-insensitive)."""
    found = [line for line in text.splitlines() if query.casefold() in line.casefold()]
    return "\n".join(found[:MAX_LINES]) or "not found"


def make(rng: random.Random, difficulty: int, options: Options) -> Question | None:
    """A question of `difficulty` hops; None if the draw failed."""
    question = fact_world(options.entities, options.world_seed).question(rng, difficulty, options.obfuscation)
    return None if question is None else Question(question.prompt, question)


def problems(options: Options, split: Split, seed: int) -> Callable[[int], Problem]:
    """The numbered problems of a split: generated collections of facts."""
    return problem_stream(
        "search",
        lambda rng, difficulty: make(rng, difficulty, options),
        difficulties=(options.min_difficulty, options.max_difficulty),
        distinct=options.distinct,
        split=split,
        seed=seed,
    )


def open_episode(problem: Problem, options: Options) -> Episode:
    """A new episode of a problem."""
    key = (options.entities, options.world_seed, options.results, options.quota, options.calls_per_second,
           options.timeout_seconds, options.backend)  # fmt: skip
    sessions = shared("search", key, lambda: start_sessions(options))
    episode = SearchEpisode(problem.content, options, sessions.open())
    if not options.context_characters:
        return episode
    return ManagedEpisode(episode, ContextLimits(options.context_characters, options.context_share))


def start_sessions(options: Options) -> ToolSessions:
    """Starts the tools of all episodes with the same world and limits."""
    limits = ToolLimits(
        quota=options.quota, calls_per_second=options.calls_per_second, timeout_seconds=options.timeout_seconds
    )
    world = (options.entities, options.world_seed, options.results)
    tools = {name: Tool(functools.partial(SearchWorker, name, *world), limits) for name in ("search", "open", "find")}
    if options.backend == "threads":
        return ToolSessions(Toolbox(tools))
    from openmimo.rl.toolbox.ray_pool import RayWorkers

    return ToolSessions(Toolbox(tools, RayWorkers))


PLUGIN = Environment(
    describe="multi-hop questions over a generated fact graph, with search, open and find",
    options=Options,
    problems=problems,
    open=open_episode,
    is_instant=lambda options: False,
)
