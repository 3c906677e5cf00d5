"""Pass key: one number in a text that says the same over and over.

As in Landmark Attention (2023, arXiv 2305.16300).
"""

import random
from typing import ClassVar

from attrs import field, frozen
from attrs.validators import optional

from kvframe.eval.tasks.base import Encoder, Sample, Task, Turn, scatter, share, share_found, to_tensor
from kvframe.eval.tasks.words import numbers
from kvframe.eval.text import Haystack
from kvframe.validators import integer

INTRODUCTION = "There is a pass key in this text. Everything else does not matter.\n\n"
FILLER = "The road is long and the sky is wide. The day goes by. We walk on, and then we walk back.\n"
CLOSING = "\nWhat was the pass key?\n"


@frozen(kw_only=True)
class Passkey(Task):
    """The easiest of all: the only number in a text of one repeated line. It needs no haystack."""

    name: ClassVar[str] = "passkey"
    depth: float | None = field(default=None, validator=optional(share))
    """Share of the text before the pass key; drawn by the seed without."""
    digits: int = field(default=5, validator=integer(at_least=2))
    """Digits of the pass key."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        key = next(numbers(rng, self.digits))
        opening, closing = encoder.beginning + encoder.ids(INTRODUCTION), encoder.ids(CLOSING)
        filler = encoder.ids(FILLER)
        fact = encoder.ids(f"The pass key is {key}. Remember it: {key} is the pass key.\n")
        continuation, answers = encoder.marked([("The pass key is", False), (f" {key}", True), (".\n", False)])
        room = self.room(context_tokens, len(opening) + len(closing) + len(fact) + len(continuation))
        depth = rng.random() if self.depth is None else self.depth
        text = scatter([filler] * (room // len(filler)), [fact], rng, [depth])
        turn = Turn(
            prompt_ids=to_tensor(opening, text, closing), continuation_ids=to_tensor(continuation), answers=answers
        )
        return Sample(turns=(turn,), expected=(key,), scorer=share_found([key]), max_new_tokens=len(continuation) + 8)
