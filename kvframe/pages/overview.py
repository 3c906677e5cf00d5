"""The table of all policies, and its place in a page."""

import re

from kvframe.errors import ConfigError
from kvframe.pages import words
from kvframe.pages.markdown import code, published, table
from kvframe.registry import PolicyRecord
from kvframe.stages import SLOTS
from kvframe.traits import traits_of

_PLACE = re.compile(r"(<!-- table: overview -->\n).*?(<!-- end of table -->)", re.S)


def overview(records: list[PolicyRecord], folder: str) -> str:
    """A row a policy: paper, stage in each slot, what is lost, what moves, calibration.

    folder: where the policies' pages are, from the page that the table stands in.
    """
    rows = [
        (f"[{code(record.name)}]({folder}/{record.name}.md)", published(record), *_cells(record)) for record in records
    ]
    head = ("policy", "published", *SLOTS, "what is lost", "what moves", "calibration")
    return table(head, rows)


def _cells(record: PolicyRecord) -> list[str]:
    if record.needs:
        return [""] * (len(SLOTS) + 3)  # what it is depends on options that it has no defaults for
    traits = traits_of(record.make())
    stages = [words.stage_of(traits, slot) for slot in SLOTS]
    return [*stages, words.lost(traits), words.moved(traits), words.calibration(traits)]


def renew(page: str, body: str) -> str:
    """A page with the table `body` between its marks. Raises ConfigError where it has no such place."""
    if not _PLACE.search(page):
        raise ConfigError(
            "the page has no place for the table; expected the line <!-- table: overview --> and below it the line "
            "<!-- end of table -->"
        )
    return _PLACE.sub(lambda found: f"{found[1]}\n{body}\n{found[2]}", page)
