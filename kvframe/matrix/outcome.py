"""What became of one composition."""

from enum import StrEnum

from attrs import frozen

from kvframe.matrix.swaps import Swap


class Verdict(StrEnum):
    """The four ends of a trial, from what is hoped for to what must never be."""

    RUNS = "runs"
    REFUSED = "refused"
    ERROR = "error"
    DIFFERENT = "different"


@frozen(kw_only=True)
class Outcome:
    """One swap's end."""

    swap: Swap
    verdict: Verdict
    reason: str = ""
    """Why it was refused, or what went wrong."""
    selections: int = 0
    """Of all heads, over the whole trial."""
    rows_recalled: int = 0
    """Rows that came from the store."""
