"""InfiniteBench Code.Run: the result of a call in a file of one-line functions that call each other (2402.13718).

A chain of 2 to 10 calls determines the result. The wording is ours.
"""

import random

from openmimo.core.records import Message
from openmimo.evals.task import Example, NoOptions, Room, Seed, Task
from openmimo.evals.tasks._scoring import last_number_matches

_DEPTHS = (2, 4, 6, 8, 10)


def example(options: NoOptions, room: Room, seed: Seed) -> Example:
    """Functions in random order, and one call."""
    return room.fill(lambda units: _build(room, str(seed), units), least=max(_DEPTHS))


def _build(room: Room, seed: str, count: int) -> Example:
    rng = random.Random(seed)
    calls, argument = rng.choice(_DEPTHS), rng.randint(-10, 10)
    names = rng.sample(range(count), count)
    chain, others = names[:calls], names[calls:]
    added = {name: rng.choice([*range(-12, 0), *range(1, 18)]) for name in names}
    called = dict(zip(chain, chain[1:], strict=False))
    for place, name in enumerate(others[1:]):
        called[name] = others[place]  # the first of the others calls nothing, so nothing is recursive
    functions = "\n".join(_function(name, called.get(name), added[name]) for name in range(count))
    answer = str(argument + sum(added[name] for name in chain))
    prompt = (
        f"Here is a file of functions.\n{functions}\nWhat does func_{chain[0]}({argument}) return? Answer with the "
        "number only."
    )
    return Example(
        turns=(Message("user", prompt),),
        answer=answer,
        max_tokens=room.answer_tokens(f" {answer}", 5),
        answer_start=f"\nThe value of func_{chain[0]}({argument}) is",
    )


def _function(name: int, called: int | None, added: int) -> str:
    value = "x" if called is None else f"func_{called}(x)"
    return f"def func_{name}(x): return {value} {'+' if added > 0 else '-'} {abs(added)}"


PLUGIN = Task(version=1, options=NoOptions, example=example, score=last_number_matches)
