"""Which stage goes with which policy: every swap is made, and runs or is refused with the reason."""

from kvframe.matrix.outcome import Outcome, Verdict
from kvframe.matrix.swaps import Swap, swaps
from kvframe.matrix.sweep import outcomes

__all__ = ["Outcome", "Swap", "Verdict", "outcomes", "swaps"]
