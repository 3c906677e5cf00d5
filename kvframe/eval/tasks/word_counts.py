"""Counting words: which come often in a long list (RULER, 2024, arXiv 2404.06654).

No single place of the text holds the answer, so a policy that picks a few tokens has to pick them well.
"""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from string import ascii_lowercase
from typing import ClassVar

from attrs import field, frozen

from kvframe.errors import ConfigError
from kvframe.eval.tasks.base import Encoder, Piece, Sample, Task, Turn, share_found, to_tensor
from kvframe.eval.tasks.words import names
from kvframe.eval.text import Haystack
from kvframe.validators import integer


def _counted(
    task: Task, encoder: Encoder, introduction: str, entries: Sequence[list[int]], closing: str, wanted: Sequence[str]
) -> Sample:
    """A list of entries, and the words that come often in it."""
    continuation, answers = encoder.marked(_listed(wanted))
    turn = Turn(
        prompt_ids=to_tensor(encoder.beginning, encoder.ids(introduction), *entries, encoder.ids(closing)),
        continuation_ids=to_tensor(continuation),
        answers=answers,
    )
    return Sample(
        turns=(turn,),
        expected=tuple(wanted),
        scorer=share_found(wanted),
        max_new_tokens=len(continuation) + 8,
    )


def _listed(words: Sequence[str]) -> list[Piece]:
    pieces: list[Piece] = [("They are:", False)]
    for place, word in enumerate(words):
        pieces += [("," if place else "", False), (f" {word}", True)]
    return [*pieces, (".\n", False)]


@frozen(kw_only=True)
class CommonWords(Task):
    """Names in a list, half of whose lines are a few names again and again; all others come once.

    The common names are asked for in the order in which they come first.
    """

    name: ClassVar[str] = "cwe"
    num_common: int = field(default=10, validator=integer(at_least=1))
    """Names that come again and again."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        introduction, closing = "A list of names.\n\n", "\nThe names that come most often in this list.\n\n"
        fresh = names(rng)
        common = list(islice(fresh, self.num_common))
        # Before the list there is its order: what the common names take is known, and the same each time.
        lines = dict(zip(common, encoder.each([f"{name}\n" for name in common])))
        continuation, _ = encoder.marked(_listed(common))
        taken = len(encoder.beginning) + len(encoder.ids(introduction)) + len(encoder.ids(closing)) + len(continuation)
        # What the order of the names does to the length of the continuation.
        room = self.room(context_tokens, taken + self.num_common, at_least=3 * sum(map(len, lines.values())))
        repeats = max(2, room // 2 // sum(map(len, lines.values())))
        entries = [lines[name] for name in common for _ in range(repeats)]
        room -= sum(map(len, entries))
        for line in _encoded(encoder, fresh):
            if len(line) > room:
                break
            entries.append(line)
            room -= len(line)
        rng.shuffle(entries)
        ordered = sorted(common, key=lambda name: entries.index(lines[name]))
        return _counted(self, encoder, introduction, entries, closing, ordered)


def _encoded(encoder: Encoder, words: Iterator[str]) -> Iterator[list[int]]:
    while True:
        yield from encoder.each([f"{word}\n" for word in islice(words, 64)])


@frozen(kw_only=True)
class FrequentWords(Task):
    """Made-up words, the r-th most frequent of them coming in proportion to r ** -alpha; the first few are asked for,
    the most frequent first."""

    name: ClassVar[str] = "fwe"
    num_frequent: int = field(default=3, validator=integer(at_least=1))
    """Words that are asked for."""
    num_words: int = field(default=50, validator=integer(at_least=2))
    """Different words."""
    alpha: float = field(default=2.0)
    """How steeply the frequencies fall."""

    @alpha.validator
    def _check_alpha(self, attribute: object, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 < value < float("inf"):
            raise ConfigError(f"FrequentWords.alpha must be a number > 1, got {value!r}")

    def __attrs_post_init__(self) -> None:
        if self.num_frequent >= self.num_words:
            raise ConfigError(f"num_words must be more than num_frequent, got {self.num_words} and {self.num_frequent}")

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        introduction, closing = "A text in an unknown language.\n\n", "\n\nThe most frequent words of this text.\n\n"
        words = _words(rng, self.num_words)
        encoded = encoder.each([f" {word}" for word in words])
        wanted = words[: self.num_frequent]
        continuation, _ = encoder.marked(_listed(wanted))
        taken = len(encoder.beginning) + len(encoder.ids(introduction)) + len(encoder.ids(closing)) + len(continuation)
        weights = [(rank + 1) ** -self.alpha for rank in range(self.num_words)]
        once, mean = sum(map(len, encoded)), sum(w * len(ids) for w, ids in zip(weights, encoded))
        # So many times the likeliest word comes that the last of the wanted ones comes a few times more than others.
        least = 4 * self.num_frequent**self.alpha
        times = self.room(context_tokens, taken, at_least=once + math.ceil(least * mean)) - once
        # Counted and not drawn: which word is more frequent is not a matter of chance.
        counts = [1 + int(times / mean * weight) for weight in weights]
        left = once + times - sum(count * len(ids) for count, ids in zip(counts, encoded))
        counts[0] += int(left / len(encoded[0]))  # what rounding left over
        entries = [ids for ids, count in zip(encoded, counts) for _ in range(count)]
        rng.shuffle(entries)
        return _counted(self, encoder, introduction, entries, closing, wanted)


def _words(rng: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(ascii_lowercase, k=6))] = None
    return list(found)
