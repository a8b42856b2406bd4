"""Variable tracking on token ids: two chains of four facts in order; the value of the end of one is asked for."""

import numpy as np

from openmimo.evals.task import Example, NoOptions, Room, Seed, Task
from openmimo.evals.tasks._tokens import chain_example, exact


def example(options: NoOptions, room: Room, seed: Seed) -> Example:
    """`@ A 7`, then `@ B A`, `@ C B` and `@ D C` in filler, among those of another chain; `? D` asks for 7."""
    return chain_example(room, np.random.default_rng(seed), hops=3, num_chains=2, in_order=True)


PLUGIN = Task(version=1, options=NoOptions, example=example, score=exact)
