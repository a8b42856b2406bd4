"""Templates of small Python functions with argument generators, for `mutations` to break.

No template has a `while` loop, so every mutant terminates. The number `$K` of a template is drawn, which gives many
different functions.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Template:
    """A function template.

    Attributes:
        name: Of the function.
        source: Python source with `$K` for a number.
        arguments: `arguments(rng, k)` draws the arguments of one test.
        least: Smallest `$K`.
        most: Largest `$K`.
    """

    name: str
    source: str
    arguments: Callable[[random.Random, int], tuple[Any, ...]]
    least: int = 2
    most: int = 9


def _numbers(rng: random.Random, k: int) -> list[int]:
    return [rng.randint(-9, 20) for _ in range(rng.randint(0, 9))]


def _text(rng: random.Random, k: int) -> str:
    return "".join(rng.choice("aabbcde ") for _ in range(rng.randint(0, 12)))


TEMPLATES = (
    Template("count_above", '''
def count_above(values):
    """How many values are above $K and even."""
    count = 0
    for value in values:
        if value > $K and value % 2 == 0:
            count += 1
    return count
''', lambda rng, k: (_numbers(rng, k),)),
    Template("longest_run", '''
def longest_run(text):
    """The length of the longest run of one character, at most $K."""
    best = 0
    run = 0
    previous = None
    for character in text:
        if character == previous:
            run += 1
        else:
            run = 1
        previous = character
        if run > best:
            best = run
    return min(best, $K)
''', lambda rng, k: (_text(rng, k),), 3, 9),
    Template("window_sums", '''
def window_sums(values):
    """The sum of every $K neighbors, from left to right."""
    sums = []
    for start in range(len(values) - $K + 1):
        total = 0
        for offset in range($K):
            total += values[start + offset]
        sums.append(total)
    return sums
''', lambda rng, k: ([rng.randint(-9, 9) for _ in range(rng.randint(0, k + 6))],), 2, 6),
    Template("clamp_all", '''
def clamp_all(values):
    """The values, those below -$K raised to -$K and those above $K lowered to $K."""
    clamped = []
    for value in values:
        if value < -$K:
            clamped.append(-$K)
        elif value > $K:
            clamped.append($K)
        else:
            clamped.append(value)
    return clamped
''', lambda rng, k: (_numbers(rng, k),)),
    Template("digit_total", '''
def digit_total(number):
    """The sum of the digits of a number; digits above $K count twice."""
    total = 0
    for digit in str(abs(number)):
        value = int(digit)
        if value > $K:
            total += 2 * value
        else:
            total += value
    return total
''', lambda rng, k: (rng.randint(-99999, 99999),), 2, 8),
    Template("merge_counts", '''
def merge_counts(first, second):
    """The sums of two tables of counts, without entries below $K."""
    merged = {}
    for key in sorted(set(first) | set(second)):
        total = first.get(key, 0) + second.get(key, 0)
        if total >= $K:
            merged[key] = total
    return merged
''', lambda rng, k: ({key: rng.randint(0, k + 2) for key in "abc" if rng.random() < 0.7},
                     {key: rng.randint(0, k + 2) for key in "bcd" if rng.random() < 0.7})),
    Template("every_nth", '''
def every_nth(values, skip_first):
    """Every $K-th value; with skip_first the first value is left out before counting."""
    chosen = []
    for index, value in enumerate(values):
        position = index - 1 if skip_first else index
        if position >= 0 and position % $K == 0:
            chosen.append(value)
    return chosen
''', lambda rng, k: ([rng.randint(0, 9) for _ in range(rng.randint(0, 3 * k))], rng.random() < 0.5), 2, 6),
    Template("falls_and_rises", '''
def falls_and_rises(values):
    """(falls, rises): how often the next value is at least $K lower, and at least $K higher."""
    falls = 0
    rises = 0
    for index in range(1, len(values)):
        change = values[index] - values[index - 1]
        if change <= -$K:
            falls += 1
        elif change >= $K:
            rises += 1
    return [falls, rises]
''', lambda rng, k: ([rng.randint(0, 3 * k) for _ in range(rng.randint(0, 10))],), 2, 7),
    Template("score_word", '''
def score_word(word):
    """One point for a letter, $K for a vowel, nothing for blanks; words of more than 8 characters get $K more."""
    score = 0
    for letter in word:
        if letter in "aeiou":
            score += $K
        elif letter != " ":
            score += 1
    if len(word) > 8:
        score += $K
    return score
''', lambda rng, k: (_text(rng, k),)),
    Template("pairs_with_sum", '''
def pairs_with_sum(values):
    """How many pairs of places have values that add up to $K and are not equal."""
    count = 0
    for left in range(len(values)):
        for right in range(left + 1, len(values)):
            if values[left] + values[right] == $K and values[left] != values[right]:
                count += 1
    return count
''', lambda rng, k: ([rng.randint(0, k) for _ in range(rng.randint(0, 8))],), 2, 9),
    Template("page_bounds", '''
def page_bounds(total, page):
    """[first, last] item of a page of $K items, counted from 1; [0, 0] for a page that does not exist."""
    first = (page - 1) * $K + 1
    if page < 1 or first > total:
        return [0, 0]
    last = min(first + $K - 1, total)
    return [first, last]
''', lambda rng, k: (rng.randint(0, 4 * k), rng.randint(0, 5))),
    Template("change_coins", '''
def change_coins(amount):
    """The fewest coins of 1, $K and ten times $K for an amount, the largest first."""
    coins = []
    for coin in (10 * $K, $K, 1):
        coins.append(amount // coin)
        amount = amount % coin
    return coins
''', lambda rng, k: (rng.randint(0, 40 * k),), 2, 9),
)  # fmt: skip
