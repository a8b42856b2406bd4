"""InfiniteBench number string: a number of ten digits with repetitions in a repeated line.

Definition: Zhang et al. 2024 (2402.13718), Retrieve.Number: five random digits and five repetitions of them. The
wording is ours.
"""

import random

from openmimo.evals.tasks._hidden_number import hidden_number_task
from openmimo.evals.tasks._words import digits


def _draw(rng: random.Random) -> str:
    number = digits(rng, 5)
    for _ in range(5):
        place = rng.randrange(len(number))
        number = number[:place] + number[place] + number[place:]
    return number


PLUGIN = hidden_number_task("sequence of digits", 12, _draw)
