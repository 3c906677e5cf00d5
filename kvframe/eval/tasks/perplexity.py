"""Perplexity of a long text."""

import random
from typing import ClassVar

from attrs import field, frozen

from kvframe.eval.tasks.base import Encoder, Sample, Task, Turn, to_tensor
from kvframe.eval.text import Haystack
from kvframe.validators import integer


@frozen(kw_only=True)
class Perplexity(Task):
    """The end of a text, after all that comes before it. There are no answers: read `perplexity`, `nll` and `kl`."""

    name: ClassVar[str] = "perplexity"
    num_tokens: int = field(default=256, validator=integer(at_least=1))
    """Tokens that are predicted."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        taken = len(encoder.beginning) + self.num_tokens
        room = self.room(context_tokens, taken, at_least=2)
        paragraphs = haystack.slice(encoder.tokenizer, room + self.num_tokens, rng)
        text = [token for paragraph in paragraphs for token in paragraph]
        return Sample(
            turns=(Turn(prompt_ids=to_tensor(encoder.beginning, text[:room]), continuation_ids=to_tensor(text[room:])),)
        )
