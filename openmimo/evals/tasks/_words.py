"""Small lists of words, from which the text tasks draw keys, names, sentences and made-up words."""

import random
import uuid
from collections.abc import Iterator

_ADJECTIVES = (
    "amber ancient autumn bitter bold brave breezy bright brisk calm careful cheerful clever cloudy cool copper crisp "
    "curious dapper deep distant dusty eager early earnest fair fancy fearless firm fleet fluffy fond frosty gentle "
    "giant glad golden grand gray green happy hardy hasty hidden hollow honest humble icy idle ivory jolly keen kind "
    "lively lone loud lucky mellow merry mighty mild misty modest narrow neat nimble noble odd olive patient plain "
    "pleasant polite proud quick quiet rapid rare rosy round rusty sandy scarlet sharp shiny silent silver simple "
    "sleepy slender smooth snowy solid spare steady stony sturdy subtle sunny swift tall tender tidy timid tiny urban "
    "useful vast velvet vivid warm wary western wild windy wise witty young"
)
_NOUNS = (
    "acorn anchor anvil apple apron arrow badge bakery banner barrel basin basket beacon bell bench berry bicycle "
    "blanket boat bottle bridge broom bucket button cabin camera candle canoe carpet castle cedar chalk chapel cherry "
    "chimney circus clock cloud coat comet compass copper corner cottage cradle crane creek crown curtain dagger desk "
    "drum eagle easel engine falcon feather fence ferry fiddle field flag flute forest fossil fountain gallery garden "
    "gate glove hammer harbor hazel helmet hill hinge island jacket jar jewel kettle kite ladder lake lamp lantern "
    "ledger lemon lever library lily lock lumber magnet maple marble market meadow mill mirror mitten mountain needle "
    "nest oar oasis ocean orchard oven paddle palace panel parrot path pear pebble pencil piano pillow pine pipe pond "
    "poplar portrait pottery puzzle quarry quilt raft railway rake ribbon river road rope rudder saddle sail school "
    "shelf shell shovel signal sleeve spoon spruce stable statue stove street sugar table teapot temple thread ticket "
    "tower trail tunnel valley vessel village violin wagon wallet walnut water wheat wheel whistle willow window "
    "winter yard"
)
_NAMES = (
    "Ada Albert Alma Anton Astrid Basil Beatrix Bruno Carla Cedric Clara Conrad Dagmar Dora Edgar Edith Elias Elsa "
    "Emil Erika Felix Flora Frida Gerda Gilbert Greta Gustav Hanna Hazel Hector Helga Hugo Ida Igor Ilse Irene Jasper "
    "Jonas Julia Karin Kaspar Klara Lars Leo Lena Lorenz Lydia Magda Marcus Martha Matilda Milo Mona Nadia Nils Nora "
    "Olaf Olga Oscar Otto Paula Petra Quentin Ramona Reuben Rita Roland Rosa Rufus Sabine Selma Sigrid Simon Stella "
    "Sven Tanya Theo Thora Ulrich Ursula Vera Victor Viola Walter Wanda Wilma Xenia Yara Yvonne Zelda Zeno"
)
_VERBS = "carried painted repaired borrowed measured noticed moved cleaned described counted wrapped sketched"
_PLACES = "at the market,in the garden,near the river,behind the mill,on the hill,by the old gate,in the library"
ADJECTIVES, NOUNS, NAMES, VERBS = _ADJECTIVES.split(), _NOUNS.split(), _NAMES.split(), _VERBS.split()
PLACES = _PLACES.split(",")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences without names, numbers or a story."""
    while True:
        first, second = rng.choice(NOUNS), rng.choice(NOUNS)
        yield (
            f"A person with a {rng.choice(ADJECTIVES)} {first} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} "
            f"{second} {rng.choice(PLACES)}."
        )


def distinct_keys(rng: random.Random) -> Iterator[str]:
    """Endless distinct keys `adjective-noun`, then with a second adjective once all of these are used."""
    used: set[str] = set()
    pairs = len(ADJECTIVES) * len(NOUNS)
    while True:
        key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        if len(used) > pairs // 2:
            key = f"{rng.choice(ADJECTIVES)}-{key}"
        if key not in used:
            used.add(key)
            yield key


def identifier(rng: random.Random) -> str:
    """A random UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def digits(rng: random.Random, count: int) -> str:
    """A number of `count` digits that does not begin with 0."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def made_up_words(rng: random.Random, syllables: int) -> Iterator[str]:
    """Endless distinct words of no language, with more syllables once most short ones are used."""
    used: set[str] = set()
    while True:
        if len(used) > (len(_CONSONANTS) * len(_VOWELS)) ** syllables // 2:
            syllables += 1
        word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables))
        if word not in used:
            used.add(word)
            yield word


def join_names(names: list[str]) -> str:
    """Names as in a sentence: `a`, `a and b`, or `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
