"""Environments that fail in `open`, `respond` or `reward`: by an exception, by a wrong value, or by hanging."""

import math
import sys
import threading
from dataclasses import dataclass, replace

import numpy as np
import torch
from rl_runs import letters_problems

from openmimo.core.records import Message
from openmimo.rl.agents.environment import Environment, EnvResponse

REWARDS = {
    "nan": math.nan, "inf": math.inf, "hundred": 100.0, "minus": -1.0, "text": "0.5", "none": None, "list": [1.0],
    "numpy_nan": np.float32("nan"), "half": 0.5, "numpy": np.float32(0.25), "tensor": torch.tensor(1.0), "true": True,
    "rounding": 1.0 + 1e-9,
}  # fmt: skip


@dataclass(frozen=True)
class FailingOptions:
    """Options of the failing environment.

    Attributes:
        where: open, respond, reward, or nowhere.
        how: raise, exit, hang, or a name of REWARDS.
        every: one of this many episodes fails (1: all).
        words: length of the question.
    """

    where: str = "reward"
    how: str = "raise"
    every: int = 1
    words: int = 1


hang = threading.Event()  # setting it ends the calls that hang
_counted = {"episodes": 0}


class FailingEpisode:
    tools, stop = (), ()

    def __init__(self, problem, options):
        _counted["episodes"] += 1
        self._options = options if _counted["episodes"] % options.every == 0 else replace(options, where="nowhere")
        self.messages = (Message("user", " ".join([str(problem.content)] * options.words)),)
        self._text = ""
        self._fail("open")

    def _fail(self, where):
        if where == self._options.where and self._options.how == "raise":
            raise LookupError("the key of the answer is lost")
        if where == self._options.where and self._options.how == "exit":
            sys.exit(3)
        if where == self._options.where and self._options.how == "hang":
            hang.wait(60)

    def respond(self, text):
        self._text = text
        self._fail("respond")
        return EnvResponse()

    def reward(self):
        self._fail("reward")
        if self._options.where == "reward" and self._options.how in REWARDS:
            return REWARDS[self._options.how]
        return min(1.0, sum(letter in "aeiounrst" for letter in self._text) / 8)

    def close(self):
        pass


FAILING = Environment("fails", FailingOptions, letters_problems, FailingEpisode)
SLOW_FAILING = replace(FAILING, is_instant=lambda options: False)
