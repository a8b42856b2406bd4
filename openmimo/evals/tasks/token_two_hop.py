"""Two hops on token ids: four pairs of facts `@ A 7` and `@ B A` in any order; `? B` asks for 7."""

import numpy as np

from openmimo.evals.task import Example, NoOptions, Room, Seed, Task
from openmimo.evals.tasks._tokens import chain_example, exact


def example(options: NoOptions, room: Room, seed: Seed) -> Example:
    """Pairs of facts in filler, and the query of one."""
    return chain_example(room, np.random.default_rng(seed), hops=1, num_chains=4, in_order=False)


PLUGIN = Task(version=1, options=NoOptions, example=example, score=exact)
