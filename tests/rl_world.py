"""A policy small enough to roll out and train in a test, with scripted episodes."""

import functools
import itertools
import re
from dataclasses import replace

import torch
from conftest import randomize, tiny_config

from openmimo.core.records import Message
from openmimo.core.samples import Sample
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig
from openmimo.engine.engine import Engine
from openmimo.model.mimo import MiMo
from openmimo.rl.agents.environment import EnvResponse
from openmimo.rl.rollouts.engine import EngineRollouts
from openmimo.rl.scheduling.groups import GroupRequest
from openmimo.rl.scheduling.problems import Problem

_CORPUS = ["The quick brown fox jumps over the lazy dog, 0123456789.\n", "def add(a, b):\n    return a + b\n"]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(_CORPUS, vocab_size=320)


@torch.no_grad()
def policy(seed: int = 0, *, num_layers: int = 3, mtp_heads: int = 0, ends: float = 3.0) -> MiMo:
    """A random model of full and sliding attention with experts.

    Args:
        ends: factor of the weights of the end-of-turn tokens; larger values end turns earlier.
    """
    config = tiny_config(num_layers=num_layers, mtp_heads=mtp_heads)
    config = replace(config, vocab_size=tokenizer().vocab_size, max_positions=320)
    model = randomize(MiMo(config), seed)
    model.lm_head.weight[list(tokenizer().eos_token_ids)] *= ends
    return model


class Scripted:
    """An episode with fixed responses and a fixed reward, which records the policy's turns.

    Args:
        answers: responses in order; an exception is raised in place of one.
        reward: the reward, or an exception to raise.
    """

    def __init__(
        self, *answers: EnvResponse | Exception, reward: float | Exception = 1.0, question: str = "add 1 and 2"
    ):
        self.messages = (Message("user", question),)
        self.tools, self.stop = (), ()
        self.heard, self.num_closed, self._answers, self._reward = [], 0, list(answers), reward

    def respond(self, text: str) -> EnvResponse:
        self.heard.append(text)
        return _said(self._answers.pop(0)) if self._answers else EnvResponse()

    def reward(self) -> float:
        return _said(self._reward)

    def close(self) -> None:
        self.num_closed += 1


def _said(value):
    if isinstance(value, Exception):
        raise value
    return value


def request(number: int = 0, *, samples: int = 4, max_answer_tokens: int = 24, temperature: float = 1.0, partials=None):
    group = f"math/{number}"
    ids = tuple(f"{group}/{index}" for index in range(samples))
    problem = Problem(f"p{number}", number)
    return GroupRequest(group, "math", problem, ids, partials or {}, temperature, max_answer_tokens, 0)


def open_rollouts(model: MiMo, open_episode, *, max_sequences: int = 8, **options) -> EngineRollouts:
    config = EngineConfig(max_sequences=max_sequences, prefill_tokens=64, speculative=False, cache_gigabytes=0.01)
    return EngineRollouts(Engine(model, tokenizer(), config), open_episode, **options)


def finish(rollouts: EngineRollouts) -> dict[str, Sample]:
    """Polls until nothing runs. Returns all samples by id."""
    found = {}
    for _ in itertools.takewhile(lambda _: rollouts.num_running, range(5000)):
        found |= {sample.info["sample_id"]: sample for sample in rollouts.poll()}
    assert not rollouts.num_running
    return dict(sorted(found.items()))


def roll_out(model: MiMo, open_episode=lambda request: Scripted(), *requests: GroupRequest, **options) -> list[Sample]:
    """Returns the samples of these requests (by default one, of four samples) in the order of their ids."""
    rollouts = open_rollouts(model, open_episode, **options)
    for own in requests or (request(),):
        rollouts.submit(own)
    return list(finish(rollouts).values())


def pages_in_use(rollouts: EngineRollouts) -> int:
    """Drops the prefix cache. Returns the number of pages that are still in use."""
    rollouts._engine.prefix.clear()
    return rollouts._engine.arena.num_pages - rollouts._engine.arena.num_free


def words(count: int) -> str:
    """A text of `count` words."""
    return " ".join(itertools.islice(itertools.cycle(re.findall(r"\w+", _CORPUS[0])), count))
