"""Several questions about one long text, one turn after the other over the same cache."""

import random
from itertools import islice
from typing import ClassVar

from attrs import field, frozen

from kvframe.eval.tasks.base import Encoder, Sample, Task, Turn, scatter, share_found, to_tensor
from kvframe.eval.tasks.niah import INTRODUCTION, needle, question
from kvframe.eval.tasks.words import names, numbers
from kvframe.eval.text import Haystack
from kvframe.validators import integer


@frozen(kw_only=True)
class MultiTurn(Task):
    """Needles in a text, asked for one a turn; a turn's question is read in full, its answer is decoded."""

    name: ClassVar[str] = "multi_turn"
    num_turns: int = field(default=4, validator=integer(at_least=2))
    """Questions."""
    num_needles: int = field(default=8, validator=integer(at_least=2))
    """Needles in the text, at least as many as there are questions."""
    digits: int = field(default=7, validator=integer(at_least=2))
    """Digits of a number."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        facts = list(islice(zip(names(rng), numbers(rng, self.digits)), max(self.num_turns, self.num_needles)))
        asked = rng.sample(facts, self.num_turns)
        opening = encoder.beginning + encoder.ids(INTRODUCTION)
        parts = encoder.each([needle(*fact) for fact in facts])
        questions = encoder.each([f"\n\nQuestion: what is the secret number of the {name}?\n" for name, _ in asked])
        said = [encoder.marked(question(*fact)) for fact in asked]
        taken = len(opening) + sum(map(len, parts)) + sum(map(len, questions)) + sum(len(ids) for ids, _ in said)
        room = self.room(context_tokens, taken)
        text = scatter(haystack.slice(encoder.tokenizer, room, rng), parts, rng)
        turns: list[Turn] = []
        for prompt, (ids, answers) in zip(questions, said):
            before = [] if turns else opening + text
            turns.append(Turn(prompt_ids=to_tensor(before, prompt), continuation_ids=to_tensor(ids), answers=answers))
        expected = tuple(number for _, number in asked)
        return Sample(
            turns=tuple(turns),
            expected=expected,
            scorer=share_found(expected[:1]),
            max_new_tokens=len(turns[0].continuation_ids) + 8,
        )
