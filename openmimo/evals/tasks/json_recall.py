"""HELMET JSON KV: the value of a key of a JSON object, after two solved questions (2410.02694). Wording: ours."""

from openmimo.evals.tasks._pairs import pair_task

PLUGIN = pair_task(num_shown=2)
