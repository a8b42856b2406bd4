"""Spoken words of the telephone prompts by name of their file, and sentences that can be composed of them.

Only files whose name determines the words are listed: numbers, ordinals, days, months, letters, the radio alphabet, and
files named by their words.
"""

import random
from collections.abc import Callable

_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ORDINAL_ONES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
_ORDINAL_TEENS = (
    "tenth", "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth",
    "nineteenth",
)  # fmt: skip
_ORDINAL_TENS = ("twentieth", "thirtieth", "fortieth", "fiftieth", "sixtieth", "seventieth", "eightieth", "ninetieth")
_DAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
_RADIO = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima", "mike",
    "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee",
    "zulu",
)  # fmt: skip
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_BY_NAME = {
    "digits": (
        "at", "dollars", "hundred", "thousand", "million", "billion", "minus", "oh", "pound", "star", "today",
        "tomorrow", "yesterday",
    ),
    "letters": ("asterisk", "at", "dash", "dollar", "dot", "equals", "plus", "slash", "space", "zed"),
    "": (
        "activated", "added", "calling", "cancelled", "disabled", "enabled", "extension", "for", "goodbye", "hello",
        "hours", "is", "location", "lowercase", "minute", "minutes", "number", "removed", "second", "seconds", "time",
        "uppercase", "with", "your", "call-forwarding", "call-waiting", "do-not-disturb", "hello-world",
        "one-moment-please", "please-try-again", "telephone-number", "you-entered", "is-set-to", "is-in-use",
    ),
    "vm-": ("and", "extension", "first", "for", "from", "last", "message", "messages", "minutes", "press", "received"),
}  # fmt: skip
_OTHERS = {
    "digits/a-m": "a m", "digits/p-m": "p m", "digits/oclock": "o'clock", "im-sorry": "i'm sorry",
    "vm-youhave": "you have", "vm-INBOX": "new", "vm-Old": "old", "vm-Urgent": "urgent", "vm-Work": "work",
    "vm-Family": "family", "vm-Friends": "friends",
}  # fmt: skip


def spoken_words() -> dict[str, str]:
    """Returns the words of each prompt whose name determines them, by its path without ending (`digits/4`)."""
    words = {f"digits/{number}": word for number, word in enumerate(_ONES + _TEENS)}
    words |= {f"digits/{10 * ten}": word for ten, word in enumerate(_TENS, 2)}
    words |= {f"digits/h-{number}": word for number, word in enumerate(_ORDINAL_ONES + _ORDINAL_TEENS, 1)}
    words |= {f"digits/h-{10 * ten}": word for ten, word in enumerate(_ORDINAL_TENS, 2)}
    words |= {f"digits/h-{word}": f"{word}th" for word in ("hundred", "thousand", "million", "billion")}
    words |= {f"digits/day-{number}": word for number, word in enumerate(_DAYS)}
    words |= {f"digits/mon-{number}": word for number, word in enumerate(_MONTHS)}
    words |= {f"letters/{letter}": letter for letter in _LETTERS}
    words |= {f"phonetic/{word[0]}_p": word for word in _RADIO}
    for folder, names in _BY_NAME.items():
        start = folder if folder.endswith("-") or not folder else f"{folder}/"
        words |= {f"{start}{name}": name.replace("-", " ") for name in names}
    return words | _OTHERS


def compose(random_source: random.Random) -> list[str]:
    """Returns the parts of one sentence as a telephone system says it; each part is one of the spoken words.

    A number, a row of digits, a time, a date, a spelled word, or the state of a mailbox or an extension.
    """
    return random_source.choice(_SENTENCES)(random_source)


def _digits(source: random.Random) -> list[str]:
    return [source.choice(_ONES) for _ in range(source.randint(2, 5))]


def _number(source: random.Random) -> list[str]:
    value = source.randint(21, 999)
    thousands = source.randint(1, 99) if source.random() < 0.3 else 0
    return ([*_below_thousand(thousands), "thousand"] if thousands else []) + _below_thousand(value)


def _below_thousand(value: int) -> list[str]:
    hundreds, rest = divmod(value, 100)
    parts = [_ONES[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        parts += [_TENS[rest // 10 - 2]] + ([_ONES[rest % 10]] if rest % 10 else [])
    elif rest:
        parts.append((_ONES + _TEENS)[rest])
    return parts


def _time(source: random.Random) -> list[str]:
    minute = source.randrange(60)
    minutes = ["o'clock"] if minute == 0 else (["oh", _ONES[minute]] if minute < 10 else _below_thousand(minute))
    return [*_below_thousand(source.randint(1, 12)), *minutes, source.choice(("a m", "p m"))]


def _date(source: random.Random) -> list[str]:
    day = source.randint(1, 30)
    tens, ones = divmod(day, 10)
    if day < 20:
        ordinal = [(_ORDINAL_ONES + _ORDINAL_TEENS)[day - 1]]
    else:
        ordinal = [_TENS[tens - 2], _ORDINAL_ONES[ones - 1]] if ones else [_ORDINAL_TENS[tens - 2]]
    return [source.choice(_DAYS), source.choice(_MONTHS), *ordinal]


def _spelled(source: random.Random) -> list[str]:
    alphabet = _RADIO if source.random() < 0.5 else tuple(_LETTERS)
    return [source.choice(alphabet) for _ in range(source.randint(2, 4))]


def _mailbox(source: random.Random) -> list[str]:
    count = source.randint(1, 40)
    kind = source.choice(("new", "old", "urgent"))
    return ["you have", *_below_thousand(count), kind, "message" if count == 1 else "messages"]


def _extension(source: random.Random) -> list[str]:
    state = source.choice(("activated", "added", "cancelled", "disabled", "enabled", "removed"))
    return ["extension", *_digits(source)[:3], "is", state]


_SENTENCES: tuple[Callable[[random.Random], list[str]], ...] = (
    _digits, _number, _time, _date, _spelled, _mailbox, _extension,
)  # fmt: skip
