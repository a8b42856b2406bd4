"""Scripted policies for every environment: one that solves it, one that does nothing, and the loop that plays an
episode.
"""

import re
from collections.abc import Generator

from openmimo.rl.agents.environment import EnvResponse, Episode
from openmimo.rl.scheduling.problems import Problem
from openmimo.rl.worlds.facts import fact_world

Script = Generator[str, EnvResponse, None]

# Options under which the contract tests play these environments; all others have their defaults.
OPTIONS = {"task": {"task": {"name": "addition"}}}


def play(episode: Episode, script: Script) -> float:
    """Plays an episode to its end. Returns the reward."""
    answer = episode.respond(next(script))
    while not answer.is_last:
        try:
            text = script.send(answer)
        except StopIteration:
            break
        answer = episode.respond(text)
    return episode.reward()


def call(function: str, /, **arguments: str) -> str:
    """A call in the chat format."""
    lines = [f"<parameter={key}>{value}</parameter>" for key, value in arguments.items()]
    return "\n".join(["<tool_call>", f"<function={function}>", *lines, "</function>", "</tool_call>"])


def task(problem: Problem) -> Script:
    """Solves `task`: the answer."""
    yield problem.content.answer


def calculator(problem: Problem) -> Script:
    """Solves `calculator`: innermost brackets first."""
    text = problem.content.expression
    while not re.fullmatch(r"-?\d+", text):
        step = re.search(r"\((-?\d+[-+*]\d+)\)", text) or re.fullmatch(r"(-?\d+[-+*]\d+)", text)
        answer = yield f"<c>{step[1]}</c>"
        text = text[: step.start()] + answer.text[1:-1] + text[step.end() :]
    yield text


def store(problem: Problem) -> Script:
    """Solves `store`: one instruction after the other."""
    for line in problem.content.prompt.split(", "):
        verb, first, second = line.split()
        value = (yield f"<get {first}>").text[1:-1]
        if verb == "swap":
            other = (yield f"<get {second}>").text[1:-1]
            yield f"<set {first} {other}>"
        yield f"<set {second} {value}>"
    yield "done"


def functions(problem: Problem) -> Script:
    """Solves `functions`: follows the chain for each goal, and unlocks what is locked."""
    first, *_, last = nouns = problem.content.nouns
    for name, status in problem.content.goals:
        record = (yield call(f"find_{first}", name=name)).messages[0].content
        for noun, following in zip(nouns, nouns[1:], strict=False):
            record = (yield call(f"get_{following}_of_{noun}", **{f"{noun}_id": record})).messages[0].content
        change = call(f"set_{last}", **{f"{last}_id": record}, status=status)
        if "locked" in (yield change).messages[0].content:
            yield call(f"unlock_{last}", **{f"{last}_id": record})
            yield change
    yield "done"


def search(problem: Problem) -> Script:
    """Solves `search`: searches for each name of the chain, opens its page and finds the next name there."""
    kinds = {entity.name: entity for entity in fact_world(120, 0).entities.values()}
    name = problem.content.path[0][0]
    for _, relation in problem.content.path:
        found = (yield call("search", query=name)).messages[0].content
        page = next(line for line in found.splitlines() if name in line).partition(":")[0]
        text = (yield call("open", page=page)).messages[0].content
        value = kinds[name].facts[relation]
        assert value in text
        name = value
    yield name


def code(problem: Problem) -> Script:
    """Solves `code`: reads the file, replaces the wrong function by the right one and finishes."""
    content = problem.content
    text = (yield call("bash", command=f"cat {content.path}")).messages[0].content
    assert content.broken.strip() in text
    yield call("str_replace", path=content.path, old_str=content.broken.strip(), new_str=content.whole.strip())
    yield call("finish")


ORACLES = {
    "task": task, "calculator": calculator, "store": store, "functions": functions, "search": search, "code": code,
}  # fmt: skip


def lazy() -> Script:
    """Writes a text without a call."""
    yield "I would rather not."
