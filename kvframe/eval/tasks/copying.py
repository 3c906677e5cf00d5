"""Verbatim copy: a passage of the text is said a second time, word by word."""

import random
from typing import ClassVar

from attrs import field, frozen

from kvframe.eval.tasks.base import Encoder, Sample, Task, Turn, share, to_tensor
from kvframe.eval.text import Haystack
from kvframe.validators import integer

CLOSING = "\n\nHere is a passage of the text above once more, word by word.\n\n"


@frozen(kw_only=True)
class Copy(Task):
    """A passage of the text again, from its first few tokens on.

    Every token of it is an answer. A model that copies finds the place by what it has just said, so that its queries
    move through the text token by token.
    """

    name: ClassVar[str] = "copy"
    copy_tokens: int = field(default=128, validator=integer(at_least=1))
    """Tokens to copy."""
    cue_tokens: int = field(default=16, validator=integer(at_least=2))
    """Tokens of the passage that are given."""
    depth: float = field(default=0.25, validator=share)
    """Share of the text before the passage, about; it begins with a paragraph."""

    def _make(self, encoder: Encoder, context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        closing = encoder.ids(CLOSING)
        length = self.cue_tokens + self.copy_tokens
        taken = len(encoder.beginning) + len(closing) + length
        room = self.room(context_tokens, taken, at_least=length)
        paragraphs = haystack.slice(encoder.tokenizer, room, rng)
        text = [token for paragraph in paragraphs for token in paragraph]
        start = self._start(paragraphs, room - length)
        passage = text[start : start + length]
        turn = Turn(
            prompt_ids=to_tensor(encoder.beginning, text, closing, passage[: self.cue_tokens]),
            continuation_ids=to_tensor(passage[self.cue_tokens :]),
            answers=tuple((token, token + 1) for token in range(self.copy_tokens)),
        )
        expected = str(encoder.tokenizer.decode(passage[self.cue_tokens :]))
        return Sample(
            turns=(turn,), expected=(expected,), scorer=_Prefix(text=expected), max_new_tokens=self.copy_tokens
        )

    def _start(self, paragraphs: list[list[int]], last: int) -> int:
        """The first paragraph at `depth` or behind it, if it begins early enough."""
        start = 0
        for paragraph in paragraphs:
            if start >= self.depth * last:
                break
            start += len(paragraph)
        return min(start, last)


@frozen(kw_only=True)
class _Prefix:
    """Scores a text by the share of the passage that it says right before its first mistake, in characters."""

    text: str

    def __call__(self, text: str) -> float:
        same = 0
        for said, wanted in zip(text, self.text):
            if said != wanted:
                break
            same += 1
        return same / max(1, len(self.text))
