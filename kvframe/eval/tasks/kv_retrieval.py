"""Key-value lines: a text that is nothing but names with numbers, some of which are asked for.

As in Lost in the Middle (2023, arXiv 2307.03172) and the lines of LongEval (2023).
"""

import random
from itertools import islice
from typing import ClassVar

from attrs import field, frozen

from kvframe.eval.tasks.base import Encoder, Piece, Sample, Task, Turn, share_found, to_tensor
from kvframe.eval.tasks.words import names, numbers
from kvframe.eval.text import Haystack
from kvframe.validators import integer

INTRODUCTION = "A list of names, each with its number.\n\n"
CLOSING = "\nSome of these names once more, each with its number.\n\n"


@frozen(kw_only=True)
class KvRetrieval(Task):
    """Lines of a name and a number, as many as the context holds: everything looks like what is looked for."""

    name: ClassVar[str] = "kv_retrieval"
    num_queries: int = field(default=8, validator=integer(at_least=1))
    """Lines that are asked for."""
    digits: int = field(default=5, validator=integer(at_least=2))
    """Digits of a number."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        opening, closing = encoder.beginning + encoder.ids(INTRODUCTION), encoder.ids(CLOSING)
        facts = zip(names(rng), numbers(rng, self.digits))
        asked = list(islice(facts, self.num_queries))
        pieces = [piece for name, number in asked for piece in _pieces(name, number)]
        continuation, answers = encoder.marked(pieces)
        lines = encoder.each([_line(*fact) for fact in asked])
        taken = len(opening) + len(closing) + len(continuation) + sum(map(len, lines))
        room = self.room(context_tokens, taken)
        while True:
            batch = encoder.each([_line(*fact) for fact in islice(facts, 64)])
            fitting = _fitting(batch, room)
            lines += batch[:fitting]
            room -= sum(map(len, batch[:fitting]))
            if fitting < len(batch):
                break
        rng.shuffle(lines)
        turn = Turn(
            prompt_ids=to_tensor(opening, *lines, closing), continuation_ids=to_tensor(continuation), answers=answers
        )
        expected = tuple(number for _, number in asked)
        return Sample(
            turns=(turn,), expected=expected, scorer=share_found(expected), max_new_tokens=len(continuation) + 8
        )


def _line(name: str, number: str) -> str:
    return f"{name}: {number}\n"


def _pieces(name: str, number: str) -> list[Piece]:
    return [(f"{name}:", False), (f" {number}", True), ("\n", False)]


def _fitting(lines: list[list[int]], room: int) -> int:
    """How many of the lines fit."""
    for count, line in enumerate(lines):
        room -= len(line)
        if room < 0:
            return count
    return len(lines)
