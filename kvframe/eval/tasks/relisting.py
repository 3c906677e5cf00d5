"""Long output: a table is written, and then written again.

The prompt does not hold the table. What the second writing needs was generated hundreds of tokens earlier, so it tests
what a policy does with output: when its segments end, and whether they are found.
"""

import random
from itertools import islice
from typing import ClassVar, Literal

from attrs import field, frozen

from kvframe.eval.tasks.base import Encoder, Piece, Sample, Task, Turn, to_tensor
from kvframe.eval.tasks.words import names, numbers
from kvframe.eval.text import Haystack
from kvframe.validators import integer, one_of

CLOSING = "\n\nEnough of that text. A table of names and numbers follows, and then the same table a second time.\n\n"
FIRST, SECOND = "The table:\n", "\nThe table a second time:\n"


@frozen(kw_only=True)
class Relisting(Task):
    """A table of names and numbers twice, after a text that has nothing to do with it; the numbers of the second time
    are the answers."""

    name: ClassVar[str] = "relisting"
    output_tokens: int = field(default=1024, validator=integer(at_least=64))
    """Tokens of both tables together, at most."""
    order: Literal["shuffled", "same"] = field(default="shuffled", validator=one_of("shuffled", "same"))
    """Of the rows the second time; in the same order, the table is copied row by row."""
    digits: int = field(default=5, validator=integer(at_least=2))
    """Digits of a number."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        facts = list(islice(zip(names(rng), numbers(rng, self.digits)), self.output_tokens // 8))
        widths = [len(ids) for ids in encoder.each([f"{name}: {number}\n" for name, number in facts])]
        left = self.output_tokens - len(encoder.ids(FIRST)) - len(encoder.ids(SECOND))
        num_rows = 0
        while num_rows < len(facts) and left >= 2 * widths[num_rows]:
            left -= 2 * widths[num_rows]
            num_rows += 1
        rows = facts[:num_rows]
        again = rows if self.order == "same" else rng.sample(rows, num_rows)
        pieces: list[Piece] = [(FIRST + "".join(f"{name}: {number}\n" for name, number in rows) + SECOND, False)]
        for name, number in again:
            pieces += [(f"{name}:", False), (f" {number}", True), ("\n", False)]
        continuation, answers = encoder.marked(pieces)
        closing = encoder.ids(CLOSING)
        room = self.room(context_tokens, len(encoder.beginning) + len(closing) + len(continuation))
        text = haystack.slice(encoder.tokenizer, room, rng)
        turn = Turn(
            prompt_ids=to_tensor(encoder.beginning, *text, closing),
            continuation_ids=to_tensor(continuation),
            answers=answers,
        )
        return Sample(turns=(turn,), expected=tuple(number for _, number in again))
