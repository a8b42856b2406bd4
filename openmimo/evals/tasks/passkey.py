"""InfiniteBench passkey: a number of five digits in a repeated line.

Definition: Zhang et al. 2024 (2402.13718), Retrieve.PassKey. The wording is ours.
"""

from openmimo.evals.tasks._hidden_number import hidden_number_task
from openmimo.evals.tasks._words import digits

PLUGIN = hidden_number_task("pass key", 6, lambda rng: digits(rng, 5))
