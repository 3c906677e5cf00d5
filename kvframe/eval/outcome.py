"""What became of a cell."""

from typing import Any

from attrs import field, frozen


@frozen(kw_only=True)
class Outcome:
    """The end of one cell: its figures, or why there are none."""

    key: str
    figures: dict[str, Any] | None = None
    """Plain data; None where the cell failed."""
    error: str | None = None
    """The traceback, or what is known of a worker that died."""
    seconds: float
    environment: dict[str, Any] = field(factory=dict)
    """Versions and machine that the figures were made with."""

    @property
    def failed(self) -> bool:
        """Whether there are no figures."""
        return self.error is not None

    @property
    def reason(self) -> str:
        """The last line of the traceback."""
        lines = (self.error or "").strip().splitlines()
        return lines[-1] if lines else ""
