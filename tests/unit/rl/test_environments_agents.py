"""Function calling, search and code agents: the difficulty of each, and attempts that must not help."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from environment_players import ORACLES, call, play

from openmimo.core.errors import ConfigError
from openmimo.rl.agents.environment import ENVIRONMENTS
from openmimo.rl.environments import code, functions, search
from openmimo.rl.toolbox import ToolFailureError, close_shared, shared_metrics
from openmimo.rl.worlds.facts import RELATIONS, fact_world
from openmimo.rl.worlds.functions import TEMPLATES
from openmimo.rl.worlds.mutations import KINDS, mutants_of, normal_form
from openmimo.rl.worlds.repositories import make_repository
from openmimo.runtime.sandbox import Sandbox, SandboxUnavailableError

PATIENCE_SECONDS = 20.0


@pytest.fixture(autouse=True)
def _ends_what_is_shared():
    yield
    close_shared()


def first_response(episode, text):
    return episode.respond(text).messages[0].content


# Functions


def make_application(**options):
    plugin = ENVIRONMENTS.get("functions")
    settings = plugin.options(**options)
    return plugin.problems(settings, "train", 0)(0), settings


def test_several_goals_and_long_chains_can_be_reached():
    problem, options = make_application(min_difficulty=6, max_difficulty=6, goals=4, locked_share=1.0)
    assert problem.content.prompt.count("Set the status") == 4
    assert play(functions.open_episode(problem, options), ORACLES["functions"](problem)) == 1.0


def test_hidden_state_must_be_inferred():
    problem, options = make_application(min_difficulty=1, max_difficulty=1, locked_share=1.0)
    last = problem.content.nouns[-1]
    name, status = problem.content.goals[0]
    change = call(f"set_{last}", **{f"{last}_id": problem.content.target(name)}, status=status)
    episode = functions.open_episode(problem, options)
    assert "is locked" in first_response(episode, change)
    assert episode.reward() == 0.0
    assert "locked" not in problem.content.prompt


def test_side_effects_cost_the_reward():
    problem, options = make_application(min_difficulty=1, max_difficulty=1, locked_share=0.0)
    last = problem.content.nouns[-1]
    other = next(
        record for record in problem.content.statuses if record != problem.content.target(problem.content.goals[0][0])
    )
    for extra in ("delete", "set"):
        episode = functions.open_episode(problem, options)
        wrong = {f"{last}_id": other}
        if extra == "set":
            wrong["status"] = next(one for one in functions.STATUSES if one != problem.content.statuses[other])
        first_response(episode, call(f"{extra}_{last}", **wrong))
        assert play(episode, ORACLES["functions"](problem)) == 0.0


def test_handles_of_the_wrong_kind_are_refused():
    problem, options = make_application(min_difficulty=2, max_difficulty=2)
    first, second, last = problem.content.nouns
    handle = next(iter(problem.content.names.values()))
    episode = functions.open_episode(problem, options)
    assert first_response(episode, call(f"get_{last}_of_{second}", **{f"{second}_id": handle})).startswith("error: ")
    assert first_response(episode, call(f"find_{first}", name="Unknown")).startswith("error: ")
    assert first_response(episode, call(f"unlock_{last}", **{f"{last}_id": handle})).startswith("error: ")


# Search


@pytest.mark.parametrize("obfuscation", [0, 1, 2])
def test_questions_have_the_answer_of_their_path(obfuscation):
    world = fact_world(120, 0)
    rng = random.Random(0)
    for depth in range(1, 7):
        questions = [world.question(rng, depth, obfuscation) for _ in range(40)]
        questions = [question for question in questions if question]
        assert questions
        for question in questions:
            assert len(question.path) == depth
            name = question.path[0][0]
            for entity, relation in question.path:
                assert entity == name
                name = world.entities[entity].facts[relation]
            assert name == question.answer
            assert question.answer not in question.prompt
            assert (question.path[0][0] in question.prompt) == (obfuscation == 0)


def test_worlds_are_whole():
    world = fact_world(120, 3)
    assert fact_world(120, 3) is world
    words = [word for name in world.entities for word in name.split()]
    assert len(set(words)) == len(words)
    for entity in world.entities.values():
        for relation, value in entity.facts.items():
            assert world.entities[value].kind == RELATIONS[entity.kind][relation][0]
            assert value in world.pages[entity.page]


def test_described_entities_can_be_found():
    world, rng = fact_world(120, 0), random.Random(1)
    for _ in range(30):
        question = world.question(rng, 1, 1)
        if question:
            assert world.entities[question.path[0][0]].page in world.search(question.first, 5)


def open_question(**options):
    plugin = ENVIRONMENTS.get("search")
    settings = plugin.options(**options)
    problem = plugin.problems(settings, "train", 0)(0)
    return problem, plugin.open(problem, settings)


def test_search_tools():
    problem, episode = open_question()
    name = problem.content.path[0][0]
    page = first_response(episode, call("search", query=name)).splitlines()[0].partition(":")[0]
    text = first_response(episode, call("open", page=page))
    assert text.startswith(name)
    assert first_response(episode, call("find", page=page, text=name.upper())) == text
    assert first_response(episode, call("find", page=page, text="zebra")) == "not found"
    assert first_response(episode, call("open", page="page-0")) == "error: there is no page 'page-0'"
    assert first_response(episode, call("search", query="?!")) == "no page has any of these words"
    episode.close()
    assert shared_metrics()["tools/search/open/mistakes"] == 1.0
    assert shared_metrics()["tools/search/sessions/open"] == 0.0


def test_search_goes_on_past_its_context():
    problem, episode = open_question(min_difficulty=4, max_difficulty=4, context_characters=4000)
    script = ORACLES["search"](problem)
    text, parts = next(script), 1
    turns = []
    while True:
        answer = episode.respond(text)
        if answer.is_last:
            following = episode.successor()
            if following is None:
                break
            episode.close()
            episode, parts = following, parts + 1
            # the oracle gets the results from the summary in the new task
            assert turns[-1] in episode.messages[-1].content or len(turns) == 1
            results = episode.messages[-1].content.rpartition("\n---\n")[2].removeprefix("The latest results:\n")
            answer = type(answer)(messages=(type(episode.messages[0])("tool", results),))
        turns.append(answer.messages[0].content)
        text = script.send(answer)
    assert parts > 1
    assert episode.reward() == 1.0
    history = episode._inner.run("open", {"page": "history-1"})
    assert turns[0] in history
    assert episode._inner.run("find", {"page": "history-1", "text": "What is the name"})
    episode.close()
    assert shared_metrics()["tools/search/sessions/open"] == 0.0


def test_search_has_quotas():
    plugin = ENVIRONMENTS.get("search")
    options = plugin.options(quota=1)
    problems = [plugin.problems(options, "train", 0)(index) for index in range(6)]
    with ThreadPoolExecutor(6) as threads:
        rewards = threads.map(lambda problem: play(plugin.open(problem, options), ORACLES["search"](problem)), problems)
        assert list(rewards) == [1.0] * 6


@pytest.mark.parametrize("wrong", [{"obfuscation": 3}, {"entities": 4}, {"results": 0}])
def test_search_options_are_checked(wrong):
    with pytest.raises(ConfigError, match="obfuscation must be"):
        search.Options(**wrong)


# Code


def test_all_kinds_of_bugs_exist_and_each_is_found_by_a_test():
    kinds = set()
    for seed in range(20):
        repository = make_repository(random.Random(seed), 3)
        kinds.add(repository.kind)
        assert repository.broken != repository.whole
        assert repository.broken in repository.files[repository.path]
        assert repository.whole not in "".join(repository.files.values())
        assert sorted(test for group in repository.groups for test in group) == list(range(len(repository.tests)))
    assert kinds == set(KINDS)


def test_the_same_bug_has_the_same_issue():
    issues = {}
    for seed in range(200):
        repository = make_repository(random.Random(seed), 2)
        assert issues.setdefault(repository.broken, repository.issue) == repository.issue


def test_mutants_are_different_and_whole_functions_are_not_among_them():
    for template in TEMPLATES:
        source = template.source.replace("$K", str(template.least))
        mutants = mutants_of(source)
        assert len({mutant.source for mutant in mutants}) >= 5
        assert normal_form(source) not in {mutant.source for mutant in mutants}
        assert "while" not in template.source


@pytest.fixture
def opened():
    """Opens an episode of the code environment; skips on machines without a jail."""
    try:
        Sandbox()
    except SandboxUnavailableError as error:
        pytest.skip(str(error).splitlines()[0])

    def open_with(index=0, **options):
        settings = code.Options(**options)
        problem = code.problems(settings, "train", 0)(index)
        return problem, code.open_episode(problem, settings)

    return open_with


def test_the_repository_tells_nothing_but_the_repository(opened):
    problem, episode = opened()
    listed = first_response(episode, call("bash", command="find . -mindepth 1 -printf '%P %T@\\n' | sort"))
    names = {line.split()[0] for line in listed.splitlines()}
    folders = {path.partition("/")[0] for path in problem.content.files if "/" in path}
    assert names == set(problem.content.files) | folders
    assert {line.split()[1].partition(".")[0] for line in listed.splitlines()} == {"1700000000"}
    episode.close()


def test_code_tools_tell_mistakes(opened):
    problem, episode = opened(output_characters=100)
    path = problem.content.path
    assert "3" in first_response(episode, call("bash", command="exit 3"))
    assert first_response(episode, call("bash", command="true")) == "(no output)"
    assert first_response(episode, call("bash", command=" ")) == "error: there is no command"
    long = first_response(episode, call("bash", command="seq 1000"))
    assert len(long) < 200
    assert "characters ..." in long
    for place in ("nowhere.py", "../x", "/etc/passwd", path.partition("/")[0]):
        assert first_response(episode, call("str_replace", path=place, old_str="a", new_str="b")).startswith("error: ")
    assert "0 times" in first_response(episode, call("str_replace", path=path, old_str="no such text", new_str=""))
    assert "times" in first_response(episode, call("str_replace", path=path, old_str="e", new_str=""))
    assert "0 times" in first_response(episode, call("str_replace", path=path, old_str="", new_str="x"))
    episode.close()


def test_a_command_that_runs_too_long_is_reported_and_the_folder_stays(opened):
    _, episode = opened(wall_seconds=0.5)
    assert "stopped: wall" in first_response(episode, call("bash", command="touch here; sleep 60"))
    assert "here" in first_response(episode, call("bash", command="ls"))
    episode.close()


def test_finishing_without_a_fix_earns_nothing(opened):
    problem, episode = opened()
    assert episode.respond(call("finish")).is_last
    assert episode.reward() == 0.0
    episode.close()


def test_a_fix_without_finishing_earns_nothing(opened):
    problem, episode = opened()
    script = ORACLES["code"](problem)
    episode.respond(script.send(episode.respond(next(script))))
    assert episode.respond("I am done.").is_last
    assert episode.reward() == 0.0
    episode.close()


def test_work_that_breaks_the_judge_earns_nothing(opened):
    for command in (
        "rm -rf *",
        "for f in json contextlib select; do echo 'raise SystemExit(0)' > $f.py; done",
        "echo 'import os; os._exit(0)' > README.md; cat README.md > $(ls -d */ | head -1)__init__.py",
    ):
        _, episode = opened()
        episode.respond(call("bash", command=command))
        assert episode.respond(call("finish")).is_last
        assert episode.reward() == 0.0
        episode.close()


def test_partial_rewards_by_difficulty(opened):
    for rewarded in ("soft", "strict"):
        problem, episode = opened(rewarded=rewarded)
        assert play(episode, ORACLES["code"](problem)) == pytest.approx(1.0)
        episode.close()
        _, episode = opened(rewarded=rewarded)
        episode.respond(call("finish"))
        assert 0.0 <= episode.reward() < 1.0
        episode.close()


def test_close_during_a_command_leaves_nothing(opened):
    _, episode = opened(wall_seconds=0.5)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(episode.respond, call("bash", command="echo up; sleep 60"))
        waiting = threading.Event()
        for _ in range(int(PATIENCE_SECONDS / 0.01)):
            if shared_metrics()["tools/code/bash/running"]:
                break
            waiting.wait(0.01)
        episode.close()
        assert "stopped" in running.result(PATIENCE_SECONDS).messages[0].content
    held = {key: value for key, value in shared_metrics().items() if key.endswith(("/in_use", "/open", "/running"))}
    assert not any(held.values()), held


def test_folders_are_made_in_advance(opened):
    problem, episode = opened(warm=1)
    assert play(episode, ORACLES["code"](problem)) == 1.0
    episode.close()


def test_a_jail_that_breaks_down_is_no_fault_of_the_model(opened, monkeypatch):
    _, episode = opened()
    monkeypatch.setattr("openmimo.runtime.sandbox.workspace.Workspace.run", lambda *_: 1 / 0)
    with pytest.raises(ToolFailureError, match="failed"):
        episode.respond(call("bash", command="ls"))
    episode.respond(call("finish"))
    with pytest.raises(ToolFailureError):
        episode.reward()
    episode.close()
    assert shared_metrics()["tools/code/environments/in_use"] == 0.0


def test_without_a_jail_it_refuses(monkeypatch):
    monkeypatch.setattr("openmimo.runtime.sandbox.sandbox.why_not", lambda name: "not today")
    options = replace(code.Options(), tier="bubblewrap")
    problem = code.problems(options, "train", 0)(0)
    with pytest.raises(SandboxUnavailableError, match="not today"):
        code.open_episode(problem, options)
