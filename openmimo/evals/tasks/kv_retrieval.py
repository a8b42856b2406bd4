"""InfiniteBench Retrieve.KV: the value of one key of a long JSON object of UUIDs (2402.13718). The wording is ours."""

from openmimo.evals.tasks._pairs import pair_task

PLUGIN = pair_task(num_shown=0)
