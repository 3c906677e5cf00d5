"""What the framework costs and saves on one device: `kvframe bench decode|prefill|gather|kernels`.

Every benchmark compares within one run: absolute times depend on the machine and its neighbours, ratios far less.
"""

import json
from pathlib import Path
from typing import Any

from attrs import field, frozen

from kvframe.errors import ConfigError

__all__ = ["Outcome"]


@frozen(kw_only=True)
class Outcome:
    """What one benchmark found."""

    benchmark: str
    environment: dict[str, Any]
    """Device and versions."""
    conditions: dict[str, Any]
    """What was set, and what was measured once for all rows, such as bandwidths."""
    rows: list[dict[str, Any]]
    """A figure a row; all rows have the same keys, None where one does not apply."""
    ratios: dict[str, float] = field(factory=dict)
    """Comparisons of rows, by what they say."""
    notes: list[str] = field(factory=list)
    """What a reader of the figures has to know."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "benchmark": self.benchmark,
            "environment": self.environment,
            "conditions": self.conditions,
            "figures": self.rows,
            "ratios": self.ratios,
            "notes": self.notes,
        }

    def save(self, path: Path) -> None:
        """Write it as JSON; raises ConfigError where that cannot be done."""
        try:
            path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error}") from error
