"""Haystacks: long texts that tasks hide things in, cut by a seed."""

import random
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen

from kvframe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STANDARD = "python-docs"
"""What the haystack that is always there is called."""

# A paragraph with more other signs than this is a table, a grammar or code.
_SHARE_OF_PROSE = 0.95
_PROSE = re.compile(r"[a-zA-Z ,.;:'\"`*()-]")
_SHORTEST_PARAGRAPH = 80
_BREAK = "\n\n"
# Paragraphs that are tokenised at once.
_BATCH = 64


@frozen(kw_only=True, slots=False)
class Haystack:
    """A long text by its paragraphs."""

    name: str
    text: str = field(repr=False)

    @cached_property
    def paragraphs(self) -> tuple[str, ...]:
        """Its paragraphs, each on one line, the empty ones left out."""
        flat = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", self.text))
        return tuple(paragraph for paragraph in flat if paragraph)

    def slice(self, tokenizer: "PreTrainedTokenizerBase", num_tokens: int, rng: random.Random) -> list[list[int]]:
        """Token ids of consecutive paragraphs, `num_tokens` of them together; the last paragraph is cut to fit.

        rng: draws the paragraph to begin with. Behind the last paragraph the first one follows.

        Raises ConfigError where the text is not as long as that.
        """
        start = rng.randrange(len(self.paragraphs)) if self.paragraphs else 0
        found: list[list[int]] = []
        missing = num_tokens
        for ids in self._encoded(tokenizer, start):
            if missing <= 0:
                break
            found.append(ids[:missing])
            missing -= len(found[-1])
        if missing > 0:
            raise ConfigError(
                f"haystack {self.name!r} has {num_tokens - missing} tokens, {num_tokens} were asked for; take a longer "
                "text file as haystack, or a shorter context"
            )
        return found

    def _encoded(self, tokenizer: "PreTrainedTokenizerBase", start: int) -> Iterator[list[int]]:
        ordered = self.paragraphs[start:] + self.paragraphs[:start]
        for first in range(0, len(ordered), _BATCH):
            batch = [paragraph + _BREAK for paragraph in ordered[first : first + _BATCH]]
            yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def haystack(source: str | Path | None = None) -> Haystack:
    """A haystack: a UTF-8 text file, or without one the documentation of the standard library.

    The latter is the prose in `pydoc_data.topics` (PSF licence), about 55,000 tokens. It comes with Python, so the same
    seed gives the same text only under the same version of it.

    Raises ConfigError for a file that cannot be read, or has no text.
    """
    if source is None or source == STANDARD:
        return _standard()
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the haystack {path}: {error}; expected a text file in UTF-8") from error
    found = Haystack(name=path.name, text=text)
    if not found.paragraphs:
        raise ConfigError(f"the haystack {path} is empty; expected a text file")
    return found


def _standard() -> Haystack:
    from pydoc_data.topics import topics

    paragraphs = (paragraph for name in sorted(topics) for paragraph in re.split(r"\n\s*\n", topics[name]))
    flat = (" ".join(paragraph.split()) for paragraph in paragraphs)
    # A text that repeats itself could be copied from, whatever a task hides in it.
    prose = dict.fromkeys(paragraph for paragraph in flat if _is_prose(paragraph))
    return Haystack(name=STANDARD, text=_BREAK.join(prose))


def _is_prose(paragraph: str) -> bool:
    signs = len(_PROSE.findall(paragraph))
    return len(paragraph) >= _SHORTEST_PARAGRAPH and signs >= _SHARE_OF_PROSE * len(paragraph)
