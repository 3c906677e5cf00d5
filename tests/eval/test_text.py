"""Haystacks: always there, cut by a seed."""

import random
from pathlib import Path

import pytest
from eval.conftest import Tiny
from hypothesis import given
from hypothesis import strategies as st

from kvframe.errors import ConfigError
from kvframe.eval.text import STANDARD, Haystack, haystack


def test_the_standard_one():
    """Prose, without a paragraph twice, and enough of it."""
    found = haystack()

    assert found.name == STANDARD == haystack(STANDARD).name
    assert len(set(found.paragraphs)) == len(found.paragraphs)
    assert len(found.text) > 200_000


@given(num_tokens=st.integers(0, 3000), seed=st.integers(0, 50))
def test_slices_have_the_length_asked_for(num_tokens: int, seed: int):
    """Consecutive paragraphs, from one that the seed draws; only the last is cut."""
    from eval.conftest import make_tiny

    tiny = make_tiny()
    found = tiny.haystack.slice(tiny.tokenizer, num_tokens, random.Random(seed))
    again = tiny.haystack.slice(tiny.tokenizer, num_tokens, random.Random(seed))
    texts = [tiny.tokenizer.decode(ids).strip() for ids in found]
    paragraphs = tiny.haystack.paragraphs
    start = random.Random(seed).randrange(len(paragraphs))

    assert found == again and sum(map(len, found)) == num_tokens
    for place, text in enumerate(texts[:-1]):
        assert text == paragraphs[(start + place) % len(paragraphs)]
    assert not texts or paragraphs[(start + len(texts) - 1) % len(paragraphs)].startswith(texts[-1])


def test_what_goes_wrong(tmp_path: Path, tiny: Tiny):
    """Too short a text, no text, no file, no UTF-8."""
    short = Haystack(name="short", text="One.\n\nTwo.")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(ConfigError, match="haystack 'short' has 12 tokens, 100 were asked for; take a longer"):
        short.slice(tiny.tokenizer, 100, random.Random(0))
    with pytest.raises(ConfigError, match="is empty; expected a text file"):
        haystack(tmp_path / "empty.txt")
    for name in ("missing.txt", "binary.txt"):
        with pytest.raises(ConfigError, match=f"cannot read the haystack .*{name}"):
            haystack(tmp_path / name)
