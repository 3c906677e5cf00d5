"""Needles in a haystack: facts hidden in a long text. The four families are those of RULER (2024, arXiv 2404.06654)."""

import random
from collections.abc import Sequence
from itertools import islice
from typing import ClassVar

from attrs import field, frozen
from attrs.validators import optional

from kvframe.eval.tasks.base import Encoder, Piece, Sample, Task, Turn, scatter, share, share_found, to_tensor
from kvframe.eval.tasks.words import names, numbers
from kvframe.eval.text import Haystack
from kvframe.validators import integer

INTRODUCTION = "Some secret numbers are written down somewhere in this text. Keep them in mind.\n\n"
CLOSING = "\n\nNow the secret numbers that were written down above.\n\n"


def needle(name: str, number: str) -> str:
    """A fact as a paragraph of its own."""
    return f"The secret number of the {name} is {number}.\n\n"


def question(name: str, number: str) -> list[Piece]:
    """The same fact as a continuation, of which the number is the answer."""
    return [(f"The secret number of the {name} is", False), (f" {number}", True), (".\n", False)]


def hide(
    task: Task,
    encoder: Encoder,
    context_tokens: int,
    rng: random.Random,
    haystack: Haystack,
    *,
    needles: Sequence[str],
    asked: Sequence[Piece],
    depths: Sequence[float] | None = None,
) -> Sample:
    """Needles in this order within the haystack, and then what is asked for."""
    opening = encoder.beginning + encoder.ids(INTRODUCTION)
    closing = encoder.ids(CLOSING)
    parts = encoder.each(needles)
    continuation, answers = encoder.marked(asked)
    taken = len(opening) + len(closing) + len(continuation) + sum(map(len, parts))
    room = task.room(context_tokens, taken)
    text = scatter(haystack.slice(encoder.tokenizer, room, rng), parts, rng, depths)
    expected = tuple(piece.strip() for piece, is_answer in asked if is_answer)
    turn = Turn(prompt_ids=to_tensor(opening, text, closing), continuation_ids=to_tensor(continuation), answers=answers)
    return Sample(turns=(turn,), expected=expected, scorer=share_found(expected), max_new_tokens=len(continuation) + 8)


@frozen(kw_only=True)
class NiahSingle(Task):
    """One needle, and nothing that looks like it."""

    name: ClassVar[str] = "niah_single"
    depth: float | None = field(default=None, validator=optional(share))
    """Share of the text before the needle; drawn by the seed without."""
    digits: int = field(default=7, validator=integer(at_least=2))
    """Digits of the number."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        name, number = next(names(rng)), next(numbers(rng, self.digits))
        depth = rng.random() if self.depth is None else self.depth
        return hide(
            self, encoder, context_tokens, rng, haystack,
            needles=[needle(name, number)], asked=question(name, number), depths=[depth],
        )  # fmt: skip


@frozen(kw_only=True)
class NiahMultikey(Task):
    """Several needles, one of which is asked for."""

    name: ClassVar[str] = "niah_multikey"
    num_needles: int = field(default=8, validator=integer(at_least=2))
    """Needles in the text."""
    digits: int = field(default=7, validator=integer(at_least=2))
    """Digits of a number."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        facts = list(islice(zip(names(rng), numbers(rng, self.digits)), self.num_needles))
        return hide(
            self, encoder, context_tokens, rng, haystack,
            needles=[needle(*fact) for fact in facts], asked=question(*rng.choice(facts)),
        )  # fmt: skip


@frozen(kw_only=True)
class NiahMultivalue(Task):
    """One name with several numbers in different places, all of which are asked for."""

    name: ClassVar[str] = "niah_multivalue"
    num_values: int = field(default=4, validator=integer(at_least=2))
    """Numbers of the name."""
    digits: int = field(default=7, validator=integer(at_least=2))
    """Digits of a number."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        name, values = next(names(rng)), list(islice(numbers(rng, self.digits), self.num_values))
        asked: list[Piece] = [(f"The secret numbers of the {name}, in the order of the text, are", False)]
        for place, value in enumerate(values):
            asked += [("," if place else "", False), (f" {value}", True)]
        return hide(
            self, encoder, context_tokens, rng, haystack,
            needles=[needle(name, value) for value in values], asked=[*asked, (".\n", False)],
        )  # fmt: skip


@frozen(kw_only=True)
class NiahMultiquery(Task):
    """Several needles, all of which are asked for, in another order than that of the text."""

    name: ClassVar[str] = "niah_multiquery"
    num_needles: int = field(default=10, validator=integer(at_least=2))
    """Needles in the text."""
    digits: int = field(default=7, validator=integer(at_least=2))
    """Digits of a number."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        facts = list(islice(zip(names(rng), numbers(rng, self.digits)), self.num_needles))
        asked = [piece for fact in rng.sample(facts, len(facts)) for piece in question(*fact)]
        return hide(
            self, encoder, context_tokens, rng, haystack, needles=[needle(*fact) for fact in facts], asked=asked
        )
