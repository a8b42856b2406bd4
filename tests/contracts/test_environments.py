"""Contract of every environment.

The same index gives the same problem. The oracle earns 1, a policy that does nothing earns 0. Mistakes are reported to
the policy and never raised.
"""

import pickle

import pytest
from environment_players import OPTIONS, ORACLES, lazy, play

from openmimo.core.errors import ConfigError
from openmimo.rl.agents.environment import ENVIRONMENTS, EnvResponse, open_environment
from openmimo.rl.toolbox import ToolFailureError, close_shared, shared_metrics
from openmimo.runtime.sandbox import Sandbox, SandboxUnavailableError

NAMES = ENVIRONMENTS.names()
GARBAGE = (
    "", "</c>", "<c></c>", "<c>1+</c>", ">", "<get>", "<set a", "<tool_call>", "<tool_call>\n<function=search>\n",
    "<tool_call>\n<function=no_such>\n</function>\n</tool_call>", "<think>", "\0", "<function=bash>",
    "<tool_call>\n<function=bash>\n<parameter=command>\0</parameter>\n</function>\n</tool_call>",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _ends_what_is_shared():
    yield
    close_shared()


@pytest.fixture(params=NAMES)
def world(request):
    if request.param == "code":
        try:
            Sandbox()
        except SandboxUnavailableError as error:
            pytest.skip(str(error).splitlines()[0])
    environment, options = open_environment(request.param, OPTIONS.get(request.param, {}))
    return request.param, environment, options


def test_every_environment_has_an_oracle():
    assert set(NAMES) <= set(ORACLES)


def test_problems_are_functions_of_index_seed_and_split(world):
    _, environment, options = world
    train = environment.problems(options, "train", 7)
    again = environment.problems(options, "train", 7)
    assert [train(index) for index in range(8)] == [again(index) for index in reversed(range(8))][::-1]
    other = environment.problems(options, "train", 8)
    assert [train(index).id for index in range(8)] != [other(index).id for index in range(8)]
    assert pickle.loads(pickle.dumps(train(0))) == train(0)


def test_splits_share_no_prompt(world):
    _, environment, options = world
    train = environment.problems(options, "train", 0)
    validation = environment.problems(options, "validation", 1)
    prompts = []
    for problems, count in ((train, 60), (validation, 20)):
        episodes = [environment.open(problems(index), options) for index in range(count)]
        prompts.append({episode.messages[-1].content for episode in episodes})
        for episode in episodes:
            episode.close()
    assert not prompts[0] & prompts[1]
    assert len(prompts[0]) > 30
    assert not {train(index).id for index in range(60)} & {validation(index).id for index in range(20)}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_oracle_and_lazy_policy(world, split):
    name, environment, options = world
    problems = environment.problems(options, split, 3)
    for index in range(3 if name == "code" else 15):
        for script, reward in ((ORACLES[name](problems(index)), 1.0), (lazy(), 0.0)):
            episode = environment.open(problems(index), options)
            assert play(episode, script) == reward
            episode.close()
            episode.close()


def test_garbage_is_answered(world):
    _, environment, options = world
    problem = environment.problems(options, "train", 0)(0)
    for text in GARBAGE:
        episode = environment.open(problem, options)
        assert isinstance(episode.respond(text), EnvResponse)
        assert episode.reward() == 0.0
        episode.close()


def test_nothing_is_held_after_close(world):
    name, environment, options = world
    problem = environment.problems(options, "train", 0)(0)
    script = ORACLES[name](problem)
    episode = environment.open(problem, options)
    episode.respond(next(script))
    episode.close()
    held = {key: value for key, value in shared_metrics().items() if key.endswith(("/open", "/in_use", "/running"))}
    assert not any(held.values()), held
    if not environment.is_instant(options):
        with pytest.raises(ToolFailureError, match="closed"):
            episode.respond(next(ORACLES[name](problem)))


def test_calls_come_to_an_end(world):
    name, environment, options = world
    if name == "task":
        pytest.skip("has no calls")
    options = type(options)(max_calls=1)
    problem = environment.problems(options, "train", 0)(0)
    first = next(ORACLES[name](problem))
    episode = environment.open(problem, options)
    answers = [episode.respond(first) for _ in range(2)]
    assert [answer.is_last for answer in answers] == [False, True]
    episode.close()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "task"])
def test_difficulties_are_checked(name):
    with pytest.raises(ConfigError, match="difficulty"):
        open_environment(name, {"min_difficulty": 3, "max_difficulty": 2})
    with pytest.raises(ConfigError, match="difficulty"):
        open_environment(name, {"max_difficulty": 1000})
