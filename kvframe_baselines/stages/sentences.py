"""Sentences: as units, as the time to select, and as what the query is averaged over."""

import re
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from kvframe.errors import ConfigError
from kvframe.stages import MeanKey, Trigger, UnitBuilder
from kvframe.stages.units import build_runs
from kvframe.types import BlockInputs, Decision, LayerLayout, StepInputs, Units
from kvframe.validators import integer, integers

_END = re.compile(r"""[.!?;。！？；…]["'”’)\]]*\s*$|\n""")
_USUAL_SIZE = 24  # tokens of a sentence of prose


def sentence_end_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens of a Hugging Face tokenizer that end a sentence: with a mark that does, or a new line in them."""
    ids = range(len(tokenizer))
    texts: Iterable[str] = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    return tuple(token for token, text in zip(ids, texts, strict=True) if _END.search(text))


def _require(stage: Any) -> None:
    """Raise ConfigError where a stage does not know which tokens end a sentence."""
    if not stage.end_ids:
        raise ConfigError(
            f"{type(stage).__name__} does not know which tokens end a sentence; use policy.fitted(tokenizer), or give "
            "end_ids=sentence_end_ids(tokenizer) of kvframe_baselines"
        )


def _is_end(ids: Tensor, end_ids: tuple[int, ...]) -> Tensor:
    return torch.isin(ids, torch.tensor(end_ids, device=ids.device))


@define(eq=False)
class LastToken:
    """Running state of one layer: whether the token before ended a sentence."""

    ended: Tensor  # bool [B]


@frozen(kw_only=True)
class SentenceUnits(UnitBuilder):
    """Sentences, each up to and with the token that ends it: SentenceKV (2025, arXiv 2504.00970).

    A sentence of more than `max_sentence` tokens is cut. What of a prompt lies in the window when generating begins is
    cut into runs of that length.
    """

    name: ClassVar[str] = "sentences"
    needs_token_ids: ClassVar[bool] = True
    end_ids: tuple[int, ...] = field(default=(), validator=integers(at_least=0))
    """Tokens that end a sentence; those of the tokenizer that the policy is fitted to."""
    max_sentence: int = field(default=64, validator=integer(at_least=1))
    """A sentence of this many tokens is closed without an end."""

    @property
    def unit_size(self) -> int:
        return 1

    @property
    def min_size(self) -> int:
        return 1

    @property
    def max_size(self) -> int:
        return self.max_sentence

    def fitted(self, tokenizer: Any) -> Self:
        return self if self.end_ids else evolve(self, end_ids=sentence_end_ids(tokenizer))

    def build(self, keys: Tensor) -> Units:
        """Runs of a usual length, for plans; a text's own sentences need its ids."""
        return build_runs(keys, min(_USUAL_SIZE, self.max_sentence))

    def build_block(self, keys: Tensor, block: BlockInputs) -> Units:
        assert block.token_ids is not None
        num_heads, num_tokens, _ = keys.shape
        places = torch.arange(num_tokens, device=keys.device)
        # A sentence starts behind an end; each start inside a long one is a multiple of `max_sentence` behind its own.
        starts = torch.ones(num_tokens, dtype=torch.bool, device=keys.device)
        starts[1:] = _is_end(block.token_ids[:-1], self.end_ids)
        first = torch.where(starts, places, 0).cummax(0).values
        starts |= (places - first) % self.max_sentence == 0
        sizes = starts.nonzero()[:, 0].diff(append=places.new_tensor([num_tokens]))
        return Units(order=places.expand(num_heads, -1), sizes=sizes.expand(num_heads, -1))

    def init(self, layout: LayerLayout) -> LastToken:
        """Raises ConfigError where the ends of sentences are not known."""
        _require(self)
        return LastToken(torch.zeros(layout.batch_size, dtype=torch.bool, device=layout.device))

    def boundary(self, inputs: StepInputs, decision: Decision, state: LastToken) -> Tensor:
        assert inputs.token_ids is not None
        cut = state.ended[:, None].expand(-1, inputs.layout.num_kv_heads).clone()
        state.ended.copy_(_is_end(inputs.token_ids, self.end_ids))
        return cut


@define(eq=False)
class FirstStep:
    """Running state of one layer: no step since the prompt."""

    first: Tensor  # bool [B, H]


@frozen(kw_only=True)
class SentenceTrigger(Trigger):
    """Select when a sentence has ended, at the step of the token that ends it: SentenceKV (2025, arXiv 2504.00970).

    And at the first step after the prompt, or after a turn's text.
    """

    name: ClassVar[str] = "sentence-end"
    needs_token_ids: ClassVar[bool] = True
    end_ids: tuple[int, ...] = field(default=(), validator=integers(at_least=0))
    """Tokens that end a sentence; those of the tokenizer that the policy is fitted to."""

    def fitted(self, tokenizer: Any) -> Self:
        return self if self.end_ids else evolve(self, end_ids=sentence_end_ids(tokenizer))

    def init(self, layout: LayerLayout) -> FirstStep:
        """Raises ConfigError where the ends of sentences are not known."""
        _require(self)
        return FirstStep(torch.ones(layout.batch_size, layout.num_kv_heads, dtype=torch.bool, device=layout.device))

    def begin(self, query: Tensor, state: FirstStep) -> None:
        state.first.fill_(True)

    def step(self, inputs: StepInputs, state: FirstStep) -> Decision:
        assert inputs.token_ids is not None
        due = _is_end(inputs.token_ids, self.end_ids)[:, None] | state.first
        state.first.fill_(False)
        return Decision(due=due)


@define(eq=False)
class Sentence:
    """Running state of one layer: the sentence being written."""

    total: Tensor  # [B, Hq, D] in at least float32, the sum of its queries
    count: Tensor  # int64 [B], its tokens
    ended: Tensor  # bool [B], its last token ended it


@frozen(kw_only=True)
class SentenceMeanKey(MeanKey):
    """Mean keys of units, asked with the mean query of the sentence being written: SentenceKV (2025, arXiv 2504.00970).

    The sentence begins behind the last end, or behind the prompt, and takes this step's query in.
    """

    name: ClassVar[str] = "sentence-mean-key"
    capturable: ClassVar[bool] = False
    needs_token_ids: ClassVar[bool] = True
    end_ids: tuple[int, ...] = field(default=(), validator=integers(at_least=0))
    """Tokens that end a sentence; those of the tokenizer that the policy is fitted to."""

    def fitted(self, tokenizer: Any) -> Self:
        return self if self.end_ids else evolve(self, end_ids=sentence_end_ids(tokenizer))

    def init(self, layout: LayerLayout) -> Sentence:
        """Raises ConfigError where the ends of sentences are not known."""
        _require(self)
        shape = (layout.batch_size, layout.num_qo_heads, layout.head_dim)
        dtype = torch.promote_types(layout.dtype, torch.float32)
        return Sentence(
            total=torch.zeros(shape, dtype=dtype, device=layout.device),
            count=torch.zeros(layout.batch_size, dtype=torch.int64, device=layout.device),
            ended=torch.zeros(layout.batch_size, dtype=torch.bool, device=layout.device),
        )

    def begin(self, query: Tensor, state: Sentence) -> None:
        state.ended.fill_(True)

    def probe(self, inputs: StepInputs, state: Sentence) -> Tensor:
        assert inputs.token_ids is not None
        goes_on = ~state.ended
        state.total.mul_(goes_on[:, None, None]).add_(inputs.query)
        state.count.mul_(goes_on).add_(1)
        state.ended.copy_(_is_end(inputs.token_ids, self.end_ids))
        return (state.total / state.count[:, None, None]).to(inputs.query.dtype)
