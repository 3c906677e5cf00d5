"""What a task is: a recipe for samples, each a prompt and a continuation that is scored token by token."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.errors import ConfigError
from kvframe.eval.text import Haystack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Tokens [start, stop) of a continuation."""
Piece = tuple[str, bool]
"""Part of a continuation, and whether it is an answer."""


@frozen(kw_only=True, eq=False)
class Turn:
    """Text that is read, and text that is then generated."""

    prompt_ids: Tensor
    """int64 [P], P >= 2: read at once, but for the last token, which is the first that is decoded."""
    continuation_ids: Tensor
    """int64 [n], what the model is made to say."""
    answers: tuple[Span, ...] = ()
    """The tokens of the continuation that have to be right, one span an answer."""

    @property
    def num_tokens(self) -> int:
        """Of prompt and continuation."""
        return len(self.prompt_ids) + len(self.continuation_ids)


@frozen(kw_only=True, eq=False)
class Sample:
    """One text to evaluate on: turns that follow each other over one cache; most tasks have one."""

    turns: tuple[Turn, ...]
    expected: tuple[str, ...] = ()
    """The answers as text."""
    scorer: Callable[[str], float] | None = None
    """Of a text that was generated freely after the first turn's prompt; None where that says nothing."""
    max_new_tokens: int = field(default=0)
    """Tokens to generate for `scorer`."""

    @property
    def num_tokens(self) -> int:
        """Of all turns."""
        return sum(turn.num_tokens for turn in self.turns)

    @property
    def num_steps(self) -> int:
        """Tokens that are predicted under the policy, one a decode step."""
        return sum(len(turn.continuation_ids) for turn in self.turns)

    @property
    def ids(self) -> Tensor:
        """int64 [1, num_tokens]: the whole text."""
        parts = [part for turn in self.turns for part in (turn.prompt_ids, turn.continuation_ids)]
        return torch.cat(parts)[None]

    @property
    def targets(self) -> Tensor:
        """int64 [num_steps]: the continuations of all turns."""
        return torch.cat([turn.continuation_ids for turn in self.turns])

    @property
    def answers(self) -> tuple[Span, ...]:
        """Spans of `targets`."""
        found: list[Span] = []
        first = 0
        for turn in self.turns:
            found += [(first + start, first + stop) for start, stop in turn.answers]
            first += len(turn.continuation_ids)
        return tuple(found)


class Task(ABC):
    """A family of samples: an `attrs.frozen` class that is its own configuration."""

    name: ClassVar[str]
    """As `kvframe.eval.task` knows it."""

    def make(self, tokenizer: "PreTrainedTokenizerBase", context_tokens: int, seed: int, haystack: Haystack) -> Sample:
        """One sample of at most `context_tokens` tokens, prompt and continuation together.

        The same arguments give the same sample. Raises ConfigError where it cannot be that short, or where the haystack
        is too short for it.
        """
        encoder = Encoder(tokenizer)
        sample = self._make(encoder, context_tokens, random.Random(f"{self.name} {seed}"), haystack)
        assert sample.num_tokens <= context_tokens
        return sample

    @abstractmethod
    def _make(self, encoder: "Encoder", context_tokens: int, rng: random.Random, haystack: Haystack) -> Sample:
        """See `make`; whatever is random comes from `rng`."""

    def room(self, context_tokens: int, taken: int, at_least: int = 0) -> int:
        """Tokens left for filling. Raises ConfigError where `at_least` of them do not remain."""
        left = context_tokens - taken
        if left < at_least:
            raise ConfigError(
                f"task {self.name} needs a context of at least {taken + at_least} tokens, got {context_tokens}; ask "
                "for a longer context, or for a smaller task"
            )
        return left

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the name and every option."""
        return {"task": self.name} | attrs.asdict(self)  # type: ignore[arg-type]


class Encoder:
    """A tokenizer, for texts that are put together from parts."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises ConfigError for a tokenizer that does not say which characters a token stands for."""
        if not tokenizer.is_fast:
            raise ConfigError(
                f"tasks need a tokenizer that says which characters a token stands for, and {type(tokenizer).__name__} "
                "does not; use a fast one"
            )
        self.tokenizer = tokenizer
        whole: Any = tokenizer("", verbose=False)["input_ids"]
        self.beginning: list[int] = [token for token in whole if token == tokenizer.bos_token_id]
        """What a text begins with under this tokenizer: its token for that, or nothing."""

    def ids(self, text: str) -> list[int]:
        """Token ids of a part that begins a line or a paragraph."""
        found: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(found)

    def each(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several parts."""
        found: Any = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return list(found)

    def marked(self, pieces: Iterable[Piece]) -> tuple[list[int], tuple[Span, ...]]:
        """Token ids of a continuation, and the tokens of every answer in it."""
        text, places = "", []
        for piece, is_answer in pieces:
            if is_answer:
                places.append((len(text), len(text) + len(piece)))
            text += piece
        encoded: Any = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        spans = []
        for start, stop in places:
            inside = [token for token, (low, high) in enumerate(offsets) if high > start and low < stop]
            spans.append((inside[0], inside[-1] + 1))
        return list(encoded["input_ids"]), tuple(spans)


def share(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    """A validator: a number from 0 to 1; raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        where = f"{type(instance).__name__}.{attribute.name}"
        raise ConfigError(f"{where} must be a number from 0 to 1, got {value!r}")


def to_tensor(*parts: Sequence[int]) -> Tensor:
    """int64 [T], the parts one after the other."""
    return torch.tensor([token for part in parts for token in part], dtype=torch.int64)


def scatter(
    paragraphs: list[list[int]], parts: list[list[int]], rng: random.Random, depths: Sequence[float] | None = None
) -> list[int]:
    """Token ids of paragraphs with the parts between them, in this order.

    depths: share of the tokens before each part, ascending; without them the parts are spread evenly, each at a random
        place of its share.
    """
    if depths is None:
        depths = [(number + rng.random()) / len(parts) for number in range(len(parts))]
    total = sum(map(len, paragraphs))
    mixed: list[int] = []
    waiting = list(zip(depths, parts, strict=True))
    done = 0
    for paragraph in paragraphs:
        while waiting and done >= waiting[0][0] * total:
            mixed += waiting.pop(0)[1]
        mixed += paragraph
        done += len(paragraph)
    for _, part in waiting:
        mixed += part
    return mixed


def share_found(expected: Sequence[str]) -> Callable[[str], float]:
    """A scorer: the share of the expected texts that stand in a text, upper and lower case alike."""
    wanted = [text.lower() for text in expected]

    def score(text: str) -> float:
        return sum(one in text.lower() for one in wanted) / len(wanted)

    return score
