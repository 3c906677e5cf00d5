"""Bits of Markdown."""

import re
from collections.abc import Iterable, Sequence

from kvframe.registry import PolicyRecord

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def code(text: object) -> str:
    """Text as code."""
    return f"`{text}`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar in a cell does not end it."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def published(record: PolicyRecord) -> str:
    """Where and when a policy was published, with a link if that is arXiv; empty where nothing is known."""
    paper, year = record.paper or "", str(record.spec.year or "")
    parts = [_ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", paper), "" if year in paper else year]
    return ", ".join(part for part in parts if part)
