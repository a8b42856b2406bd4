"""Multikey needles on token ids: as many facts as there are keys, without filler; one is asked for."""

import numpy as np

from openmimo.data.tasks._needles import KEYS, TOKENS_PER_FACT
from openmimo.evals.task import Example, NoOptions, Room, Seed, Task
from openmimo.evals.tasks._tokens import chain_example, exact


def example(options: NoOptions, room: Room, seed: Seed) -> Example:
    """Facts with different keys. Where the length has room for more than all keys, filler separates them."""
    most = max(room.length // TOKENS_PER_FACT - 1, 1)
    return chain_example(room, np.random.default_rng(seed), hops=0, num_chains=min(most, len(KEYS)), in_order=True)


PLUGIN = Task(version=1, options=NoOptions, example=example, score=exact)
