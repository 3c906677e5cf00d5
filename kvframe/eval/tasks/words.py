"""Names and numbers for tasks to hide: made of common words, so that every tokenizer knows them."""

import random
from collections.abc import Iterator
from itertools import product

ADJECTIVES = (
    "amber", "ancient", "azure", "bitter", "bold", "brave", "bright", "bronze", "calm", "clever", "cold", "copper",
    "crimson", "curious", "distant", "dusty", "early", "eager", "fierce", "frozen", "gentle", "golden", "grand",
    "green", "hidden", "hollow", "humble", "ivory", "jolly", "keen", "late", "little", "lonely", "lucky", "marble",
    "misty", "modest", "narrow", "noble", "orange", "pale", "patient", "proud", "purple", "quiet", "rapid", "rough",
    "royal", "rusty", "scarlet", "secret", "silent", "silver", "simple", "solar", "stormy", "tiny", "velvet", "violet",
    "wild",
)  # fmt: skip
NOUNS = (
    "anchor", "arrow", "badger", "beacon", "bridge", "candle", "canyon", "castle", "cedar", "cherry", "cloud", "comet",
    "coral", "crane", "desert", "dolphin", "dragon", "eagle", "engine", "falcon", "feather", "forest", "fountain",
    "garden", "glacier", "hammer", "harbor", "island", "jacket", "kettle", "ladder", "lantern", "lemon", "lion",
    "maple", "meadow", "mirror", "monkey", "mountain", "needle", "ocean", "orchid", "otter", "palace", "panther",
    "pepper", "pigeon", "planet", "river", "rocket", "saddle", "shadow", "spider", "temple", "thunder", "tiger",
    "tower", "valley", "whale", "window",
)  # fmt: skip


def names(rng: random.Random) -> Iterator[str]:
    """Names of two words, such as "amber falcon", in random order; when all 3,600 are used up, of three words."""
    yield from (f"{first} {noun}" for first, noun in _shuffled(rng, ADJECTIVES, NOUNS))
    for first, second, noun in _shuffled(rng, ADJECTIVES, ADJECTIVES, NOUNS):
        yield f"{first} {second} {noun}"


def _shuffled(rng: random.Random, *lists: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    combined = list(product(*lists))
    rng.shuffle(combined)
    return iter(combined)


def numbers(rng: random.Random, digits: int) -> Iterator[str]:
    """Numbers of so many digits, the first of them not 0, none twice. Endless, so ask for fewer than there are."""
    seen: set[int] = set()
    while True:
        number = rng.randrange(10 ** (digits - 1), 10**digits)
        if number not in seen:
            seen.add(number)
            yield str(number)
