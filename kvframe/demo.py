"""The demo's prompt: prose that is always there, with one fact placed early and a question about it at the end."""

import random
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from attrs import frozen
from torch import Tensor

from kvframe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INTRODUCTION = "Read the following text carefully. I will ask you a question about it at the end."
# Said three times over, because a model of 135 million parameters easily misses what technical prose says once.
SENTENCES = (
    "The favourite animal of the lighthouse keeper is the {animal}.",
    "Remember it: the favourite animal of the lighthouse keeper is the {animal}.",
    "Once more: the favourite animal of the lighthouse keeper is the {animal}.",
)
QUESTION = "What is the favourite animal of the lighthouse keeper?"
# None of them is in the prose, nor what the model would guess.
ANIMALS = ("bear", "elephant", "fox", "goat", "monkey", "rabbit", "snake", "tiger", "turtle", "whale", "wolf")

# A paragraph with more signs than this is a table, a grammar or code.
_SHARE_OF_LETTERS = 0.95
_SHORTEST_PARAGRAPH = 150


@frozen(kw_only=True, eq=False)
class DemoPrompt:
    """A chat of one turn, tokenised, and what is to be found in it."""

    input_ids: Tensor
    """int64 [1, T]."""
    fact: str
    question: str
    answer: str
    """What the generated text has to contain."""
    fact_start: int
    """Position of the fact's first token."""
    fact_end: int
    """Position behind its last token."""

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return self.input_ids.shape[1]

    def is_answered_by(self, text: str) -> bool:
        """Whether `text` tells the fact."""
        return re.search(rf"\b{self.answer}\b", text, re.IGNORECASE) is not None


def prose_topics() -> list[str]:
    """Prose of the standard library's `pydoc_data.topics`, a text a topic, without tables, grammars and code."""
    from pydoc_data.topics import topics

    texts = ("\n\n".join(_paragraphs(topics[name])) for name in sorted(topics))
    return [text for text in texts if text]


def build_prompt(
    tokenizer: "PreTrainedTokenizerBase", *, num_tokens: int = 4000, seed: int = 0, depth: float = 0.1
) -> DemoPrompt:
    """A prompt with at least `num_tokens` tokens of prose.

    seed: orders the prose and draws the animal that is to be remembered.
    depth: share of the prose before the fact.

    Raises ConfigError for a tokenizer without a chat template, and for more tokens than there is prose.
    """
    if tokenizer.chat_template is None:
        raise ConfigError("the demo needs a tokenizer with a chat template; this one has none")
    generator = random.Random(seed)
    animal = generator.choice(ANIMALS)
    fact = " ".join(SENTENCES).format(animal=animal)
    paragraphs = _enough(tokenizer, generator, num_tokens)
    place = round(depth * len(paragraphs))
    body = "\n\n".join([INTRODUCTION, *paragraphs[:place], fact, *paragraphs[place:], QUESTION])
    turn = [{"role": "user", "content": body}]
    chat = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert isinstance(chat, str)
    encoded = tokenizer(chat, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt")
    start = chat.index(fact)
    starts, ends = encoded["offset_mapping"][0].unbind(-1)
    inside = ((ends > start) & (starts < start + len(fact))).nonzero()[:, 0]
    return DemoPrompt(
        input_ids=encoded["input_ids"],
        fact=fact,
        question=QUESTION,
        answer=animal,
        fact_start=int(inside[0]),
        fact_end=int(inside[-1]) + 1,
    )


def _enough(tokenizer: "PreTrainedTokenizerBase", generator: random.Random, num_tokens: int) -> list[str]:
    """Paragraphs of topics in random order, as many as hold `num_tokens` tokens."""
    topics = prose_topics()
    generator.shuffle(topics)
    paragraphs = [paragraph for topic in topics for paragraph in topic.split("\n\n")]
    lengths = [len(ids) for ids in tokenizer(paragraphs, add_special_tokens=False)["input_ids"]]
    for count, total in enumerate(accumulate(lengths), start=1):
        if total >= num_tokens:
            return paragraphs[:count]
    raise ConfigError(f"the demo's prose has {sum(lengths)} tokens, {num_tokens} were asked for; ask for fewer")


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        flat = " ".join(paragraph.split())
        letters = sum(char.isalpha() or char in " ,." for char in flat)
        is_sentence = paragraph[:1].isupper() and flat.endswith(".")
        if is_sentence and len(flat) >= _SHORTEST_PARAGRAPH and letters >= _SHARE_OF_LETTERS * len(flat):
            yield flat
