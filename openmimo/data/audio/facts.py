"""Questions with four options about generated facts, in words that all telephone prompts have.

Sums, differences, days, months, and letters of the radio alphabet.
"""

import random
from dataclasses import dataclass

NUM_OPTIONS = 4
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
            "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
_DAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
_MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
           "november", "december")  # fmt: skip
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
             "eleventh", "twelfth")  # fmt: skip
_RADIO = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima",
          "mike", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "yankee",
          "zulu")  # fmt: skip

_Fact = tuple[str, str, tuple[str, ...]]


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: Its words, which the right option completes: "six plus three equals".
        right: The right option.
        options: All options in random order.
    """

    text: str
    right: str
    options: tuple[str, ...]

    @property
    def spoken(self) -> str:
        """The words of the question and of its options."""
        return f"{self.text} {' '.join(self.options)}"


def question(source: random.Random) -> Question:
    """Draws a question."""
    text, right, pool = source.choice(_FACTS)(source)
    options = [right, *source.sample([word for word in pool if word != right], NUM_OPTIONS - 1)]
    source.shuffle(options)
    return Question(text, right, tuple(options))


def _sum(source: random.Random) -> _Fact:
    one, other = source.randrange(10), source.randrange(10)
    return f"{_NUMBERS[one]} plus {_NUMBERS[other]} equals", _NUMBERS[one + other], _NUMBERS


def _difference(source: random.Random) -> _Fact:
    one = source.randrange(20)
    other = source.randrange(min(one, 9) + 1)
    return f"{_NUMBERS[one]} minus {_NUMBERS[other]} equals", _NUMBERS[one - other], _NUMBERS


def _tomorrow(source: random.Random) -> _Fact:
    day = source.randrange(7)
    word, step = source.choice((("tomorrow", 1), ("yesterday", -1)))
    return f"today is {_DAYS[day]} {word} is", _DAYS[(day + step) % 7], _DAYS


def _month(source: random.Random) -> _Fact:
    month = source.randrange(12)
    return f"{_MONTHS[month]} is", _ORDINALS[month], _ORDINALS


def _letter(source: random.Random) -> _Fact:
    word = source.choice(_RADIO)
    return f"{word[0]} is", word, _RADIO


_FACTS = (_sum, _difference, _tomorrow, _month, _letter)
